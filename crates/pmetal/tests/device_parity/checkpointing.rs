use candle_core::{DType, Tensor};
use pmetal::lora::{LoraConfig, attach};
use pmetal_models::Checkpointing;
use pmetal_ops::{Fate, Policy, Saved};

use crate::{
    common::Fixture,
    device::on_device,
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
        for (name, dtype) in [("llama", DType::F32), ("qwen3", DType::BF16)] {
            let fixture = Fixture::open(name);
            let mut model = fixture.model_on(device, dtype, None);
            let arena = attach(&mut *model, &LoraConfig { lora_dropout: 0.1, ..LoraConfig::default() }, 1).unwrap();
            let mut run = |checkpointing| {
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

fn bits(gradients: &Tensor) -> Vec<u32> {
    gradients.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}
