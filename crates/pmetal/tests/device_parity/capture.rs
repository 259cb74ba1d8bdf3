use candle_core::DType;
use pmetal::{
    lora::{LoraConfig, attach},
    ops::Arena,
    trainer::{StepSettings, start_step},
};
use pmetal_models::Checkpointing;

use crate::{
    common::Fixture,
    device::{is_real, on_device},
    training::{SETTINGS, rows},
};

/// A step in which the host waits for the device, or reads from it, cannot be captured into a CUDA graph. Replayed, it moves the
/// parameters to the bits of a step that was launched.
#[test]
fn a_training_step_can_be_captured() {
    on_device(|device| {
        if !is_real() || !device.is_cuda() {
            eprintln!("left out: graphs are CUDA's");
            return;
        }
        // a router's choice is the host's: its layers are in no graph
        let dense = ["llama", "qwen3", "gemma2", "gemma3-text", "phi3-window-hub", "granite", "cohere", "cohere2"];
        for (name, checkpointing) in
            dense.map(|name| (name, None)).into_iter().chain([("llama", Some(Checkpointing::HOST))])
        {
            let settings = StepSettings { checkpointing, ..SETTINGS };
            let rows = rows();
            let batch = [rows.iter().take(4).collect::<Vec<_>>()];
            let prepared = || {
                let mut model = Fixture::open(name).model_on(device, DType::BF16, None);
                let arena = attach(&mut *model, &LoraConfig::default(), 1).unwrap();
                (model, arena)
            };
            let values = |arena: &Arena| -> Vec<f32> {
                arena.params().flat_map(|p| p.master().flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
            };
            let (model, arena) = prepared();
            let step = || start_step(&*model, &arena, &batch, 0, 1e-3, 1, &settings);
            let mut launched = Vec::new();
            for _ in 0..4 {
                step().unwrap().finish().unwrap();
                launched.push(values(&arena));
            }
            let (model, arena) = prepared();
            let step = || start_step(&*model, &arena, &batch, 0, 1e-3, 1, &settings).map(drop).map_err(told);
            // the first step is taken, the second captured
            #[allow(unused_variables, reason = "without CUDA in the build there can be no graph")]
            let graph = pmetal_ops::uploads_kept(|| pmetal_cuda::capture(device, step)).unwrap();
            assert_eq!(values(&arena), launched[0], "{name}: the step before the capture");
            for (replays, launched) in launched[1..].iter().enumerate() {
                graph.replay().unwrap();
                assert_eq!(&values(&arena), launched, "{name}: {} replays", replays + 1);
            }
        }
    });
}

/// A trainer's error as the capture takes it.
fn told(error: pmetal::trainer::Error) -> pmetal_metal::Error {
    pmetal_metal::Error::Device { device: "the step".into(), reason: error.to_string() }
}
