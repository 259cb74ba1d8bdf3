//! Losses of fifty LoRA steps against those of PEFT. `scripts/parity/curves.py` made them and says how the numbers that are no files come about.

use std::{collections::HashMap, fs, path::PathBuf, sync::OnceLock};

use candle_core::{DType, Device, Tensor};
use pmetal::{
    data::Example,
    lora::{LoraConfig, attach},
    ops::random,
    trainer::train_step,
};
use pmetal_models::{CausalLMModel, Checkpoint, load, tensors_of};
use serde_json::Value;

use crate::{
    common::Fixture,
    device::{is_real, on_cpu, on_device},
    training::{SETTINGS, rows},
};

const CURVES: &str = include_str!("peft_curves.json");

/// How far from zero the numbers of the wide model's weights go.
const BOUND: f64 = 0.08;

/// Relative difference of losses in f32, from the order of sums.
const F32_LOSSES: f64 = 1e-5;

/// What the formula makes of a name.
pub fn named(name: &str, dims: &[usize], bound: f64) -> Tensor {
    let seed =
        name.bytes().fold(0xcbf29ce484222325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3));
    let count = dims.iter().product::<usize>() as u64;
    let numbers = (0..count).map(|i| (2.0 * random::uniform(seed, i) - 1.0) * bound as f32).collect();
    Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
}

/// The folder of the wide model.
fn wide(config: &Value) -> PathBuf {
    static WRITTEN: OnceLock<PathBuf> = OnceLock::new();
    let written = WRITTEN.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("pmetal-wide-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let spec = pmetal_models::spec_of(config).unwrap();
        let weight = |name: &str, dims: &[usize]| match name.contains("norm") {
            true => Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap(),
            false => named(name, dims, BOUND),
        };
        let weights: HashMap<String, Tensor> = tensors_of(&spec)
            .unwrap()
            .into_iter()
            .map(|(name, shape)| (name.clone(), weight(&name, shape.dims())))
            .collect();
        candle_core::safetensors::save(&weights, folder.join("model.safetensors")).unwrap();
        folder
    });
    written.clone()
}

fn wide_rows(vocab_size: usize) -> Vec<Example> {
    let row = |r: u64| {
        let ids = (0..48 + 37 * r % 96).map(|i| (random::uniform(r, i) * vocab_size as f32) as u32);
        let input_ids: Vec<u32> = ids.collect();
        let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
        Example { input_ids, labels }
    };
    (0..16).map(row).collect()
}

fn losses(curves: &Value, name: &str, device: &Device, dtype: DType, count: usize) -> Vec<f64> {
    let (mut model, rows): (Box<dyn CausalLMModel>, _) = match name {
        "wide" => {
            let model = load(&Checkpoint::open(&wide(&curves["wide_config"])).unwrap(), dtype, device, None).unwrap();
            let rows = wide_rows(model.spec().vocab_size);
            (model, rows)
        }
        _ => (Fixture::open(name).model_on(device, dtype, None), rows()),
    };
    let arena = attach(&mut *model, &LoraConfig::default(), 0).unwrap();
    for param in arena.params().filter(|param| param.name().contains("lora_A")) {
        let dims = param.master().dims().to_vec();
        param.set(&named(param.name(), &dims, 1.0 / (dims[1] as f64).sqrt())).unwrap();
    }
    let step = |i: usize| {
        let batch = (0..4).map(|k| &rows[(4 * i + k) % rows.len()]).collect();
        train_step(&*model, &arena, &[batch], i, 1e-3, i as u64 + 1, &SETTINGS).unwrap().loss
    };
    (0..count).map(step).collect()
}

/// The CPU's fifty losses, and the device's (the emulator takes six steps of the small models).
#[test]
fn losses_of_fifty_lora_steps_are_those_of_peft() {
    on_device(|device| {
        let curves: Value = serde_json::from_str(CURVES).unwrap();
        for name in ["llama", "qwen3", "wide"] {
            let peft = |dtype: &str| -> Vec<f64> { serde_json::from_value(curves[name][dtype].clone()).unwrap() };
            let (exact, rounded) = (peft("f32"), peft("bf16"));
            assert_eq!((exact.len(), rounded.len()), (50, 50));
            let worst =
                |ours: &[f64], peft: &[f64]| ours.iter().zip(peft).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
            let peft_off = worst(&rounded, &exact);
            let check = |place: &str, wide: &[f64], narrow: &[f64]| {
                let (f32_error, bf16_error, off) =
                    (worst(wide, &exact), worst(narrow, &rounded), worst(narrow, &exact));
                eprintln!(
                    "{name}, {} steps on {place}, loss {:.4} to {:.4}: from PEFT's, f32 differs by {f32_error:.1e}, bf16 by {bf16_error:.1e}; from PEFT's f32, bf16 is off by {off:.1e}, PEFT's own by {peft_off:.1e}",
                    wide.len(),
                    wide[0],
                    wide[wide.len() - 1],
                );
                assert!(f32_error <= F32_LOSSES, "{name} on {place}: f32 losses differ by {f32_error}");
                // each is off by its own roundings
                assert!(bf16_error <= 2.0 * peft_off, "{name} on {place}: bf16 losses differ by {bf16_error}");
            };
            let [on_host, half_on_host] =
                [DType::F32, DType::BF16].map(|dtype| on_cpu(|| losses(&curves, name, &Device::Cpu, dtype, 50)));
            check("the CPU", &on_host, &half_on_host);
            let count = match (is_real(), name) {
                (true, _) => 50,
                (false, "wide") => continue,
                (false, _) => 6,
            };
            let [there, half_there] =
                [DType::F32, DType::BF16].map(|dtype| losses(&curves, name, device, dtype, count));
            check("the device", &there, &half_there);
        }
    });
}
