//! Losses and gradients of adapters and of all weights against PEFT and transformers.

mod common;

use candle_core::DType;
use common::{Fixture, adapt, assert_close, full_gradient, labels, pack};
use pmetal_models::{CausalLMModel, Checkpoint, Checkpointing, Input, parameters_of};
use pmetal_ops::{Arena, backward, linear_cross_entropy};

/// Backpropagates the mean loss of the fixture's rows and returns it.
fn loss(model: &dyn CausalLMModel, fixture: &Fixture, checkpointing: Option<Checkpointing>) -> f64 {
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

fn expected_loss(fixture: &Fixture, name: &str) -> f64 {
    f64::from(fixture.expected[name].to_scalar::<f32>().unwrap())
}

const WAYS: [Option<Checkpointing>; 5] = [
    None,
    Some(Checkpointing::INPUTS),
    Some(Checkpointing::ATTENTION),
    Some(Checkpointing::HOST),
    Some(Checkpointing { whole: 1, ..Checkpointing::INPUTS }),
];

#[test]
fn gradients_of_adapters() {
    for fixture in Fixture::with_plain_adapters() {
        let mut model = fixture.model(DType::F32, None);
        let arena = adapt(&mut *model, &fixture.path.join("adapter"));
        for checkpointing in WAYS {
            arena.clear_grads();
            let (want, got) = (expected_loss(&fixture, "loss"), loss(&*model, &fixture, checkpointing));
            assert!((want - got).abs() <= 1e-5 * want, "{}: loss {got}, wanted {want}", fixture.name);
            for param in arena.params() {
                let want = &fixture.expected[&format!("grad.{}", param.name())];
                let what = format!("{} {} {checkpointing:?}", fixture.name, param.name());
                assert_close(want, &param.grad().unwrap(), 1e-4, &what);
            }
        }
    }
}

#[test]
fn gradients_of_all_weights() {
    let with_gradients = Fixture::all().into_iter().filter(|f| f.expected.contains_key("full_loss"));
    for fixture in with_gradients {
        let spec = Checkpoint::open(&fixture.path).unwrap().spec().clone();
        let arena = Arena::new(&parameters_of(&spec).unwrap(), DType::F32, &candle_core::Device::Cpu).unwrap();
        let model = fixture.model(DType::F32, Some(&arena));
        for checkpointing in WAYS {
            arena.clear_grads();
            let (want, got) = (expected_loss(&fixture, "full_loss"), loss(&*model, &fixture, checkpointing));
            assert!((want - got).abs() <= 1e-5 * want, "{}: loss {got}, wanted {want}", fixture.name);
            for param in arena.params() {
                let want = full_gradient(&fixture, param.name());
                let what = format!("{} {} {checkpointing:?}", fixture.name, param.name());
                assert_close(&want, &param.grad().unwrap(), 1e-4, &what);
            }
        }
    }
}

/// Dropout is a function of seed and place, so a layer that runs again drops the same elements.
#[test]
fn dropout_is_the_same_when_layers_run_again() {
    let fixture = Fixture::open("llama");
    let mut model = fixture.model(DType::F32, None);
    let arena = adapt(&mut *model, &fixture.path.join("adapter"));
    let without = loss(&*model, &fixture, None);
    model
        .for_each_linear(&mut |_, member| member.adapter.iter_mut().for_each(|adapter| adapter.dropout = 0.3))
        .unwrap();
    let run = |checkpointing| {
        arena.clear_grads();
        (loss(&*model, &fixture, checkpointing), arena.grads().unwrap().copy().unwrap())
    };
    let (want_loss, want) = run(None);
    assert!((want_loss - without).abs() > 1e-3);
    for checkpointing in &WAYS[1..] {
        let (loss, got) = run(*checkpointing);
        assert_eq!(loss, want_loss);
        assert_close(&want, &got, 1e-6, "gradients");
    }
}
