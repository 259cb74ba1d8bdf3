//! How operations prove themselves: the reference against central differences in f64, the kernel against the reference.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;

use crate::{
    Result, Value,
    autograd::composite,
    doctor::compare::{self, pattern, relative_error, results, rounding},
    emulate,
    rows::GradRows,
};

/// Runs `f` with the emulator's GPU in the place of the CPU.
pub(crate) fn emulated<T>(f: impl FnOnce() -> T) -> T {
    static EMULATOR: OnceLock<Arc<Emulator>> = OnceLock::new();
    emulate(EMULATOR.get_or_init(|| Arc::new(Emulator::new())).clone(), f)
}

/// Reproducible numbers around zero, f64.
pub(crate) fn random(shape: &[usize], seed: u64) -> Tensor {
    compare::random(shape, seed).unwrap()
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
    for (dtype, tolerance) in [DType::F32, DType::BF16, DType::F16].map(|dtype| (dtype, rounding(dtype))) {
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

/// Checks an operation on a GPU whose inputs are column ranges of wider matrices, as are the places of their gradients where they are
/// `placed`: results are the same bits as of contiguous ones, and gradients lie in their places.
pub(crate) fn check_columns(inputs: &[Tensor], placed: &[usize], op: impl Fn(&[Value]) -> Result<Vec<Value>>) {
    const BESIDE: usize = 8;
    for dtype in [DType::F32, DType::BF16] {
        let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let (outputs, grads) = emulated(|| run(&inputs, &op));
        let column_range = |t: &Tensor| match t.dims() {
            &[rows, width] => {
                let beside = Tensor::ones((rows, BESIDE), dtype, t.device()).unwrap();
                Tensor::cat(&[&beside, t, &beside], 1).unwrap().narrow(1, BESIDE, width).unwrap()
            }
            _ => t.clone(),
        };
        let leaf = |(i, t): (usize, &Tensor)| {
            let leaf = Value::variable(column_range(t));
            if !placed.contains(&i) {
                return leaf;
            }
            let (rows, width) = t.dims2().unwrap();
            leaf.with_grad_place(GradRows::new(rows, width + 2 * BESIDE).place(BESIDE))
        };
        let leaves: Vec<Value> = inputs.iter().enumerate().map(leaf).collect();
        let (in_columns, placed_grads) = emulated(|| results(&leaves, &op).unwrap());
        for (want, got) in outputs.iter().zip(&in_columns).chain(grads.iter().zip(&placed_grads)) {
            assert_close(want, &got.contiguous().unwrap(), 0.0, &format!("{dtype:?} in columns"));
        }
        for &i in placed {
            assert_eq!(placed_grads[i].layout().start_offset(), BESIDE, "{dtype:?} gradient {i}");
        }
    }
}

/// Outputs of an operation, and the gradients of `sum_k sum(y_k * pattern_k)` in its inputs.
fn run(inputs: &[Tensor], op: impl Fn(&[Value]) -> Result<Vec<Value>>) -> (Vec<Tensor>, Vec<Tensor>) {
    let leaves: Vec<Value> = inputs.iter().cloned().map(Value::variable).collect();
    results(&leaves, op).unwrap()
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
        terms.map(|(k, y)| (y * pattern(y, k).unwrap()).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()).sum()
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

/// Asserts that [`relative_error`] is at most `tolerance`.
pub(crate) fn assert_close(want: &Tensor, got: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(want.shape(), got.shape(), "{what}");
    let error = relative_error(want, got).unwrap();
    assert!(error <= tolerance, "{what}: differs by {error:e} of the largest value");
}
