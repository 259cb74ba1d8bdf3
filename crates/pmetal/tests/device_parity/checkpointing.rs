use candle_core::{DType, Tensor};
use pmetal::lora::{LoraConfig, attach};
use pmetal_models::{Checkpointing, Input, random};
use pmetal_ops::{Fate, Policy, Saved, backward, linear_cross_entropy};

use crate::{
    common::Fixture,
    device::{is_real, on_device},
    training::loss,
};

/// Every result recomputed, kept and at rest with the host, alone and together; layers that are kept in part and as a whole.
fn ways() -> Vec<Checkpointing> {
    let mut ways = vec![Checkpointing::INPUTS, Checkpointing::ATTENTION, Checkpointing::HOST];
    for fate in [Fate::Keep, Fate::Host] {
        ways.extend(Saved::ALL.map(|saved| Checkpointing::of(Policy::INPUTS.with(saved, fate))));
        ways.push(Checkpointing::of(Saved::ALL.into_iter().fold(Policy::INPUTS, |all, saved| all.with(saved, fate))));
    }
    ways.push(Checkpointing { kept: [1, 1, 0, 1, 1], ..Checkpointing::HOST });
    ways.push(Checkpointing { whole: 1, ..Checkpointing::HOST });
    ways
}

#[test]
fn losses_and_gradients_are_the_same_bits_however_layers_run_again() {
    on_device(|device| {
        let exact = ["llama", "deepseek-v3", "qwen3-moe"].map(|name| (name, DType::F32));
        let rounded = ["qwen3", "gemma2", "cohere", "gpt-oss", "phi3-window-hub"].map(|name| (name, DType::BF16));
        for (name, dtype) in exact.into_iter().chain(rounded) {
            let fixture = Fixture::open(name);
            let mut model = fixture.model_on(device, dtype, None);
            let arena = attach(&mut *model, &LoraConfig { lora_dropout: 0.1, ..LoraConfig::default() }, 1).unwrap();
            let run = |checkpointing| {
                arena.clear_grads();
                let loss = loss(&*model, &fixture, checkpointing);
                (loss.to_bits(), bits(arena.grads().unwrap()))
            };
            let plain = run(None);
            for way in ways() {
                assert!(plain == run(Some(way)), "{name} in {dtype:?}: {way:?}");
            }
        }
    });
}

/// As above with copies to and from the host that take as long as what is computed beside them: only a real device has such.
#[test]
fn what_rests_with_the_host_comes_back_as_it_was() {
    on_device(|device| {
        if !is_real() {
            eprintln!("left out: the emulator copies at once");
            return;
        }
        let config = serde_json::json!({
            "model_type": "qwen3", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
            "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
        });
        let mut model = random(&config, DType::BF16, device, 5, None).unwrap();
        let arena = attach(&mut *model, &LoraConfig::default(), 1).unwrap();
        let (ids, q_lens) = ((0..4096).map(|i| i * 37 % 8192).collect::<Vec<u32>>(), [2048, 1500, 548]);
        let labels: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let run = |checkpointing| {
            arena.clear_grads();
            let input = Input { checkpointing, ..Input::rows(&ids, &q_lens) };
            let hidden = model.forward(&input, None).unwrap();
            let entropy = linear_cross_entropy(&hidden, model.head(), &labels, 1.0, model.logits_spec());
            backward(entropy.unwrap().loss).unwrap();
            bits(arena.grads().unwrap())
        };
        let plain = run(None);
        assert!(plain.iter().any(|&bits| bits != 0));
        for way in ways().into_iter().chain(ways()) {
            assert!(plain == run(Some(way)), "{way:?}");
        }
    });
}

fn bits(gradients: &Tensor) -> Vec<u32> {
    gradients.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}
