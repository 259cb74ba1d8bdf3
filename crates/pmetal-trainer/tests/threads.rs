//! A training run gives the same bits on any number of threads.

use candle_core::{DType, Device};
use pmetal_data::Example;
use pmetal_lora::{LoraConfig, attach};
use pmetal_models::{CausalLMModel, Checkpointing, random, spec_of, tensors_of};
use pmetal_ops::Arena;
use pmetal_trainer::{StepSettings, train_step};

/// Wide enough that every kernel has work for several threads, with sizes that no block divides.
fn config() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 328, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 712, "vocab_size": 3001,
        "tie_word_embeddings": true, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
        "hidden_act": "silu"
    })
}

fn rows() -> Vec<Example> {
    let row = |(r, len): (u64, u64)| {
        let input_ids: Vec<u32> = (0..len).map(|i| (pmetal_ops::random::uniform(r, i) * 3001.0) as u32).collect();
        // some tokens are not trained
        let labels = (0i64..).zip(&input_ids).map(|(i, &id)| if i % 7 == 3 { -100 } else { i64::from(id) }).collect();
        Example { input_ids, labels }
    };
    (0..).zip([33, 201, 5, 130]).map(row).collect()
}

/// Bits of the losses and gradient norms of some steps, and of every parameter behind them.
fn run(model: &dyn CausalLMModel, arena: &Arena, checkpointing: Option<Checkpointing>) -> (Vec<[u64; 2]>, Vec<u32>) {
    let rows = rows();
    let micro_batches = [rows[..3].iter().collect(), rows[3..].iter().collect()];
    let settings =
        StepSettings { max_grad_norm: 1.0, weight_decay: 0.01, checkpointing, logits_bytes: 1 << 20, seed: 3 };
    let step = |step: usize| {
        let result = train_step(model, arena, &micro_batches, step, 1e-3, step as u64 + 1, &settings).unwrap();
        assert!(result.applied);
        [result.loss.to_bits(), result.grad_norm.to_bits()]
    };
    let steps = (0..3).map(step).collect();
    let values = arena.params().flat_map(|param| param.master().flatten_all().unwrap().to_vec1::<f32>().unwrap());
    (steps, values.map(f32::to_bits).collect())
}

fn lora(dtype: DType) -> (Vec<[u64; 2]>, Vec<u32>) {
    let mut model = random(&config(), dtype, &Device::Cpu, 1, None).unwrap();
    let arena = attach(model.as_mut(), &LoraConfig { lora_dropout: 0.1, ..LoraConfig::default() }, 2).unwrap();
    run(model.as_ref(), &arena, Some(Checkpointing::ATTENTION))
}

fn full(dtype: DType) -> (Vec<[u64; 2]>, Vec<u32>) {
    let spec = spec_of(&config()).unwrap();
    let arena = Arena::new(&tensors_of(&spec).unwrap(), dtype, &Device::Cpu).unwrap();
    let model = random(&config(), dtype, &Device::Cpu, 1, Some(&arena)).unwrap();
    run(model.as_ref(), &arena, None)
}

fn same_on_any_number_of_threads(train: impl Fn() -> (Vec<[u64; 2]>, Vec<u32>) + Sync) {
    let on = |threads: usize| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&train);
    let (steps, values) = on(1);
    for threads in [2, 3, 5] {
        let (other_steps, other_values) = on(threads);
        assert_eq!(other_steps, steps, "losses and gradient norms on {threads} threads");
        assert!(other_values == values, "parameters on {threads} threads");
    }
}

#[test]
fn adapters_in_bf16() {
    same_on_any_number_of_threads(|| lora(DType::BF16));
}

#[test]
fn adapters_in_f32() {
    same_on_any_number_of_threads(|| lora(DType::F32));
}

#[test]
fn every_weight_in_bf16() {
    same_on_any_number_of_threads(|| full(DType::BF16));
}
