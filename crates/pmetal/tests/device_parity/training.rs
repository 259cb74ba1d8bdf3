use candle_core::{DType, Device, Tensor};
use pmetal::{
    data::Example,
    lora::{LoraConfig, attach},
    trainer::{StepResult, StepSettings, train_step},
};
use pmetal_models::{CausalLMModel, Checkpoint, Checkpointing, Input, parameters_of};
use pmetal_ops::{Arena, backward, linear_cross_entropy};
use serde_json::Value;

use crate::{
    common::{Fixture, adapt, assert_close, full_gradient, labels, pack},
    curves::named,
    device::{ROWS, is_real, on_cpu, on_device, on_each},
    logits::picks,
};

/// Backpropagates the mean loss of the fixture's rows and returns it.
pub fn loss(model: &dyn CausalLMModel, fixture: &Fixture, checkpointing: Option<Checkpointing>) -> f64 {
    let rows = fixture.rows();
    let ((ids, q_lens), labels) = (pack(&rows), labels(&rows));
    let counted = labels.iter().filter(|&&label| label >= 0).count();
    let input = Input { checkpointing, noise: Some(17), ..Input::rows(&ids, &q_lens) };
    let hidden = model.forward(&input, None).unwrap();
    let scale = 1.0 / counted as f32;
    let entropy = linear_cross_entropy(&hidden, model.head(), &labels, scale, model.logits_spec()).unwrap();
    let loss = entropy.loss.tensor().to_scalar::<f32>().unwrap();
    backward(entropy.loss).unwrap();
    f64::from(loss)
}

const WAYS: [Option<Checkpointing>; 2] = [None, Some(Checkpointing::INPUTS)];

fn check_gradients(
    model: &dyn CausalLMModel,
    arena: &Arena,
    fixture: &Fixture,
    loss_name: &str,
    wanted: impl Fn(&str) -> Tensor,
) {
    for checkpointing in WAYS {
        arena.clear_grads();
        let want = f64::from(fixture.expected[loss_name].to_scalar::<f32>().unwrap());
        let got = loss(model, fixture, checkpointing);
        assert!((want - got).abs() <= 1e-5 * want, "{}: loss {got}, wanted {want}", fixture.name);
        for param in arena.params() {
            let what = format!("{} {} {checkpointing:?}", fixture.name, param.name());
            assert_close(&wanted(param.name()), &param.grad().unwrap(), 1e-4, &what);
        }
    }
}

#[test]
fn gradients_of_adapters_are_those_of_peft() {
    on_each(Fixture::has_plain_adapter, |device, fixture| {
        let mut model = fixture.model_on(device, DType::F32, None);
        let arena = adapt(&mut *model, &fixture.path.join("adapter"));
        check_gradients(&*model, &arena, fixture, "loss", |name| fixture.expected[&format!("grad.{name}")].clone());
    });
}

/// An adapter of numbers by formula on every linear layer, those of experts too, and the loss of the fixture's rows behind a step backward.
fn backward_with_adapter(device: &Device, fixture: &Fixture, dtype: DType, way: Option<Checkpointing>) -> (f64, Arena) {
    let mut model = fixture.model_on(device, dtype, None);
    let arena = attach(&mut *model, &LoraConfig { r: 4, ..LoraConfig::default() }, 1).unwrap();
    for param in arena.params() {
        param.set(&named(param.name(), param.value().dims(), 0.1)).unwrap();
    }
    (loss(&*model, fixture, way), arena)
}

#[test]
fn gradients_of_adapters_of_every_layer_are_those_of_the_cpu() {
    on_each(
        |_| true,
        |device, fixture| {
            let (want, exact) = on_cpu(|| backward_with_adapter(&Device::Cpu, fixture, DType::F32, None));
            for way in WAYS {
                let (got, arena) = backward_with_adapter(device, fixture, DType::F32, way);
                assert!((want - got).abs() <= 1e-5 * want, "{}: loss {got}, wanted {want}", fixture.name);
                for (want, got) in exact.params().zip(arena.params()) {
                    let what = format!("{} {} {way:?}", fixture.name, got.name());
                    assert_close(&want.grad().unwrap(), &got.grad().unwrap(), 1e-4, &what);
                }
            }
        },
    );
}

/// The most that gradients in bf16 are farther from those in f32 than the CPU's are: each is off by roundings of its own, which some
/// fixtures make large.
const APART: f64 = 3.0;

/// How far a loss and gradients in bf16 are from those in f32 (root mean square of the difference over that of the gradients). Where tokens
/// pick experts, some pick others in bf16: there the gradient is nearer to the one in f32 than nothing at all is.
#[test]
fn gradients_in_bf16_are_as_near_as_the_cpus() {
    on_each(
        |_| true,
        |device, fixture| {
            let (exact, exact_arena) = on_cpu(|| backward_with_adapter(&Device::Cpu, fixture, DType::F32, None));
            let (rounded, rounded_arena) = on_cpu(|| backward_with_adapter(&Device::Cpu, fixture, DType::BF16, None));
            let (got, arena) = backward_with_adapter(device, fixture, DType::BF16, None);
            let gradients = |arena: &Arena| arena.grads().unwrap().to_device(&Device::Cpu).unwrap();
            let want = gradients(&exact_arena);
            let mean_square = |t: &Tensor| f64::from(t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap());
            let error = |arena: &Arena| (mean_square(&(gradients(arena) - &want).unwrap()) / mean_square(&want)).sqrt();
            let (here, on_host) = (error(&arena), error(&rounded_arena));
            let [off, off_on_host] = [got, rounded].map(|loss| (loss - exact).abs() / exact);
            let name = &fixture.name;
            eprintln!("{name}: gradients off by {here:.1e} (CPU {on_host:.1e}), loss by {off:.1e} ({off_on_host:.1e})");
            if picks(fixture) {
                assert!(here < 1.0, "{name}: {here}, the CPU's {on_host}");
            } else {
                assert!(off <= 2.0 * BF16_LOSSES, "{name}: loss {got}, in f32 {exact}");
                assert!(here <= APART * on_host, "{name}: {here}, the CPU's {on_host}");
            }
        },
    );
}

#[test]
fn gradients_of_all_weights_are_those_of_torch() {
    on_each(
        |fixture| fixture.expected.contains_key("full_loss"),
        |device, fixture| {
            let spec = Checkpoint::open(&fixture.path).unwrap().spec().clone();
            let arena = Arena::new(&parameters_of(&spec).unwrap(), DType::F32, device).unwrap();
            let model = fixture.model_on(device, DType::F32, Some(&arena));
            check_gradients(&*model, &arena, fixture, "full_loss", |name| full_gradient(fixture, name));
        },
    );
}

pub fn rows() -> Vec<Example> {
    let numbers = |json: &Value| json.as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>();
    let row = |line: &str| {
        let json: Value = serde_json::from_str(line).unwrap();
        let input_ids = numbers(&json["input_ids"]).iter().map(|&x| x as u32).collect();
        Example { input_ids, labels: numbers(&json["labels"]) }
    };
    ROWS.lines().map(row).collect()
}

pub const SETTINGS: StepSettings =
    StepSettings { max_grad_norm: 1.0, weight_decay: 0.01, checkpointing: None, logits_bytes: 1 << 20, seed: 3 };

/// LoRA on every layer, four rows a step.
fn steps(device: &Device, name: &str, dtype: DType, count: usize) -> Vec<StepResult> {
    let mut model = Fixture::open(name).model_on(device, dtype, None);
    let arena = attach(&mut *model, &LoraConfig::default(), 1).unwrap();
    let rows = rows();
    let step = |i: usize| {
        let batch = (0..4).map(|k| &rows[(4 * i + k) % rows.len()]).collect();
        train_step(&*model, &arena, &[batch], i, 1e-3, i as u64 + 1, &SETTINGS).unwrap()
    };
    (0..count).map(step).collect()
}

/// The most that bf16 takes losses of such steps from those in f32 in transformers, PEFT and torch (`scripts/parity/half_losses.py`).
const BF16_LOSSES: f64 = 6.3e-3;

/// Losses of LoRA steps, the CPU's and the device's. In f32 they differ by the order of sums. In bf16 both are off, by roundings that
/// are not the same.
#[test]
fn lora_losses_are_those_of_the_cpu() {
    on_device(|device| {
        let count = if is_real() { 50 } else { 6 };
        for name in ["llama", "qwen3"] {
            let exact = on_cpu(|| steps(&Device::Cpu, name, DType::F32, count));
            let rounded = on_cpu(|| steps(&Device::Cpu, name, DType::BF16, count));
            let [wide, narrow] = [DType::F32, DType::BF16].map(|dtype| steps(device, name, dtype, count));
            let off = |a: &StepResult, b: &StepResult| (a.loss - b.loss).abs() / b.loss;
            let worst =
                |a: &[StepResult], b: &[StepResult]| a.iter().zip(b).map(|(a, b)| off(a, b)).fold(0.0, f64::max);
            let (f32_error, bf16_error) = (worst(&wide, &exact), worst(&narrow, &rounded));
            eprintln!(
                "{name}, {count} steps, loss {:.4} to {:.4}: f32 differs by {f32_error:.1e}, bf16 by {bf16_error:.1e}; from f32, bf16 is off by {:.1e} on the CPU and {:.1e} here",
                exact[0].loss,
                exact[count - 1].loss,
                worst(&rounded, &exact),
                worst(&narrow, &exact)
            );
            assert!(wide.iter().chain(&narrow).all(|step| step.applied));
            assert!(f32_error <= 1e-4, "{name}: f32 losses differ by {f32_error}");
            assert!(bf16_error <= 2.0 * BF16_LOSSES, "{name}: bf16 losses differ by {bf16_error}");
        }
    });
}
