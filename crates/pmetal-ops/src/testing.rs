//! How operations prove themselves: the reference against central differences in f64, the kernel against the reference.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;

use crate::{Result, Value, autograd::composite, emulate, gradients};

/// Runs `f` with the emulator's GPU in the place of the CPU.
pub(crate) fn emulated<T>(f: impl FnOnce() -> T) -> T {
    static EMULATOR: OnceLock<Arc<Emulator>> = OnceLock::new();
    emulate(EMULATOR.get_or_init(|| Arc::new(Emulator::new())).clone(), f)
}

/// Reproducible numbers around zero, f64.
pub(crate) fn random(shape: &[usize], seed: u64) -> Tensor {
    let n = shape.iter().product::<usize>();
    let data: Vec<f64> = (0..n).map(|i| f64::from(pmetal_cpu::normal(seed, i as u64)) * 0.7).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Checks an operation on f64 `inputs`:
/// the reference's gradient (f64, through [`composite`]) against central differences; `op` in f32, bf16 and f16, on the CPU and on the
/// emulator's GPU, against the reference on the same rounded inputs, to the dtype's rounding.
pub(crate) fn check_op(
    inputs: &[Tensor],
    reference: impl Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>> + Clone + Send + 'static,
    op: impl Fn(&[Value]) -> Result<Vec<Value>>,
) {
    let run_reference = |leaves: &[Value]| {
        let reference = reference.clone();
        composite(&leaves.iter().collect::<Vec<_>>(), move |t| reference(t))
    };
    let (outputs, grads) = run(inputs, run_reference);
    for (i, grad) in grads.iter().enumerate() {
        assert_close(&central_differences(inputs, i, &reference), grad, 1e-6, "reference gradient");
    }
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 3e-2), (DType::F16, 4e-3)] {
        let rounded: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let exact: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
        let (want, want_grads) =
            if dtype == DType::F32 { (outputs.clone(), grads.clone()) } else { run(&exact, run_reference) };
        for (place, (got, got_grads)) in [("CPU", run(&rounded, &op)), ("GPU", emulated(|| run(&rounded, &op)))] {
            for (want, got) in want.iter().zip(&got) {
                assert_close(want, got, tolerance, &format!("{place}, {dtype:?} output"));
            }
            for (i, (want, got)) in want_grads.iter().zip(&got_grads).enumerate() {
                assert_close(want, got, tolerance, &format!("{place}, {dtype:?} gradient {i}"));
            }
        }
    }
}

/// Outputs of an operation, and the gradients of `sum_k (k + 1) * sum(y_k * pattern)` in its inputs.
fn run(inputs: &[Tensor], op: impl Fn(&[Value]) -> Result<Vec<Value>>) -> (Vec<Tensor>, Vec<Tensor>) {
    let leaves: Vec<Value> = inputs.iter().cloned().map(Value::variable).collect();
    let values = op(&leaves).unwrap();
    let outputs: Vec<Tensor> = values.iter().map(|v| v.tensor().clone()).collect();
    let roots = values.into_iter().enumerate().map(|(k, v)| {
        let dy = pattern(&outputs[k], k).to_dtype(outputs[k].dtype()).unwrap();
        (v, dy)
    });
    let grads = gradients(roots.collect(), &leaves.iter().collect::<Vec<_>>()).unwrap();
    let grads = grads.into_iter().zip(inputs).map(|(g, x)| g.unwrap_or_else(|| x.zeros_like().unwrap())).collect();
    (outputs, grads)
}

/// What arrives at output `k`: numbers that differ from place to place and are exact in bf16.
fn pattern(y: &Tensor, k: usize) -> Tensor {
    let data: Vec<f64> = (0..y.elem_count()).map(|i| ((i * 7 + k * 3) % 11) as f64 * 0.25 - 1.0).collect();
    Tensor::from_vec(data, y.shape(), &Device::Cpu).unwrap()
}

fn central_differences(
    inputs: &[Tensor],
    which: usize,
    f: &impl Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>>,
) -> Tensor {
    let h = 1e-5;
    let base: Vec<f64> = inputs[which].flatten_all().unwrap().to_vec1().unwrap();
    let objective = |at: Vec<f64>| -> f64 {
        let mut moved = inputs.to_vec();
        moved[which] = Tensor::from_vec(at, inputs[which].shape(), &Device::Cpu).unwrap();
        let outputs = f(&moved).unwrap();
        let terms = outputs.iter().enumerate();
        terms.map(|(k, y)| (y * pattern(y, k)).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()).sum()
    };
    let slopes = (0..base.len()).map(|i| {
        let shifted = |by: f64| {
            let mut at = base.clone();
            at[i] += by;
            objective(at)
        };
        (shifted(h) - shifted(-h)) / (2.0 * h)
    });
    Tensor::from_vec(slopes.collect::<Vec<_>>(), inputs[which].shape(), &Device::Cpu).unwrap()
}

/// Largest difference relative to the largest magnitude wanted.
pub(crate) fn assert_close(want: &Tensor, got: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(want.shape(), got.shape(), "{what}");
    let read = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (want, got) = (read(want), read(got));
    let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance * scale, "{what}: differs by {worst:e}, largest value {scale:e}");
    assert!(got.iter().all(|x| x.is_finite()), "{what}: not finite");
}
