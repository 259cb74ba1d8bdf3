use std::ops::ControlFlow;

use candle_core::{DType, Device};
use pmetal_models::{CausalLMModel, Event, SamplingParams, Session, generate};

use crate::{
    common::{Fixture, packed_logits},
    device::{on_cpu, on_device, on_each},
    logits::{BF16_LOGITS, picks, turns_by_length},
};

fn tokens(model: &dyn CausalLMModel, prompt: &[u32], params: &SamplingParams) -> Vec<u32> {
    generate(model, prompt, params, &[], &mut |_| ControlFlow::Continue(())).unwrap().tokens
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    on_each(
        |_| true,
        |device, fixture| {
            let want = fixture.ids("greedy.0");
            let params = SamplingParams { max_tokens: want.len(), ..SamplingParams::default() };
            let model = fixture.model_on(device, DType::F32, None);
            assert_eq!(tokens(&*model, &fixture.rows()[0], &params), want, "{}", fixture.name);
        },
    );
}

/// Single tokens have kernels of their own on some devices: what they say in bf16 of the tokens they draw is off from what one forward says by
/// no more than two results that are each off by [`BF16_LOGITS`].
#[test]
fn tokens_in_bf16_are_as_likely_as_in_one_forward() {
    on_each(
        |fixture| !picks(fixture) && !turns_by_length(fixture),
        |device, fixture| {
            let (model, prompt) = (fixture.model_on(device, DType::BF16, None), &fixture.rows()[0]);
            let params = SamplingParams { max_tokens: 8, logprobs: Some(0), ..SamplingParams::default() };
            let (mut ids, mut got) = (prompt.clone(), Vec::new());
            let mut on_event = |event| {
                if let Event::Token { id, logprobs } = event {
                    ids.push(id);
                    got.push(logprobs.unwrap().logprob);
                }
                ControlFlow::Continue(())
            };
            Session::new(&*model).unwrap().generate(&*model, prompt, &params, &[], &mut on_event).unwrap();
            let logits = packed_logits(&*model, std::slice::from_ref(&ids), None).remove(0).to_vec2::<f32>().unwrap();
            let (mut differences, mut sizes) = (Vec::new(), Vec::new());
            for ((got, &id), logits) in got.iter().zip(&ids[prompt.len()..]).zip(&logits[prompt.len() - 1..]) {
                let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
                differences.push(got - (f64::from(logits[id as usize]) - sum.ln()));
                sizes.extend(logits.iter().map(|&l| f64::from(l)));
            }
            assert_eq!(differences.len(), 8);
            let of = |numbers: &[f64]| (numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64).sqrt();
            let error = of(&differences) / of(&sizes);
            assert!(error <= 2f64.sqrt() * f64::from(BF16_LOGITS), "{}: {error}", fixture.name);
        },
    );
}

#[test]
fn the_same_seed_draws_the_tokens_of_the_cpu() {
    on_device(|device| {
        let base = SamplingParams { temperature: 0.9, max_tokens: 12, seed: 5, ..SamplingParams::default() };
        let settings = [
            SamplingParams { top_k: 20, repetition_penalty: 1.3, ..base.clone() },
            SamplingParams { top_p: 0.8, ..base.clone() },
            SamplingParams { min_p: 0.05, top_k: 50, ..base },
        ];
        for name in ["llama", "qwen3"] {
            let fixture = Fixture::open(name);
            let (model, prompt) = (fixture.model_on(device, DType::F32, None), &fixture.rows()[1]);
            for params in &settings {
                let want = on_cpu(|| tokens(&*fixture.model_on(&Device::Cpu, DType::F32, None), prompt, params));
                assert_eq!(tokens(&*model, prompt, params), want, "{name} {params:?}");
            }
        }
    });
}
