use std::ops::ControlFlow;

use candle_core::{DType, Device};
use pmetal_models::{CausalLMModel, SamplingParams, generate};

use crate::{
    common::Fixture,
    device::{on_cpu, on_device},
};

fn tokens(model: &dyn CausalLMModel, prompt: &[u32], params: &SamplingParams) -> Vec<u32> {
    generate(model, prompt, params, &[], &mut |_| ControlFlow::Continue(())).unwrap().tokens
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    on_device(|device| {
        for fixture in Fixture::all() {
            let want = fixture.ids("greedy.0");
            let params = SamplingParams { max_tokens: want.len(), ..SamplingParams::default() };
            let model = fixture.model_on(device, DType::F32, None);
            assert_eq!(tokens(&*model, &fixture.rows()[0], &params), want, "{}", fixture.name);
        }
    });
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
