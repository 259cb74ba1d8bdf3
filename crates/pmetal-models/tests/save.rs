//! What is saved opens again and is the same model; fresh models.

mod common;

use std::fs;

use candle_core::{DType, Device};
use common::{Fixture, assert_close, packed_logits};
use pmetal_models::{Checkpoint, load, random, save_pretrained, tensors_of};
use pmetal_ops::Arena;
use serde_json::{Value, json};

#[test]
fn a_saved_model_gives_the_same_logits() {
    for fixture in Fixture::all() {
        let checkpoint = Checkpoint::open(&fixture.path).unwrap();
        let model = fixture.model(DType::F32, None);
        // numbers of 8 bits times their scales have more bits than bf16
        let is_fp8 = checkpoint.config()["quantization_config"]["quant_method"] == "fp8";
        let dtype = if is_fp8 { DType::F32 } else { checkpoint.stored_dtype() };
        for max_shard_bytes in [u64::MAX, 20_000] {
            let folder = tempfile::tempdir().unwrap();
            save_pretrained(&*model, checkpoint.config(), dtype, folder.path(), max_shard_bytes).unwrap();
            let saved = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(saved.spec(), checkpoint.spec());
            assert_eq!(saved.stored_dtype(), dtype);
            assert_eq!(folder.path().join("model.safetensors.index.json").exists(), max_shard_bytes == 20_000);
            let again = load(&saved, DType::F32, &Device::Cpu, None).unwrap();
            let (want, got) =
                (packed_logits(&*model, &fixture.rows(), None), packed_logits(&*again, &fixture.rows(), None));
            for (want, got) in want.iter().zip(&got) {
                assert_close(want, got, 0.0, &fixture.name);
            }
        }
    }
}

#[test]
fn the_configuration_says_what_was_saved() {
    let fixture = Fixture::open("llama3-rope-hub");
    let checkpoint = Checkpoint::open(&fixture.path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    save_pretrained(&*fixture.model(DType::F32, None), checkpoint.config(), DType::BF16, folder.path(), u64::MAX)
        .unwrap();
    let config: Value = serde_json::from_slice(&fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["dtype"], config.get("torch_dtype")), (&json!("bfloat16"), None));
    assert_eq!(config["rope_scaling"], checkpoint.config()["rope_scaling"]);
    assert_eq!(Checkpoint::open(folder.path()).unwrap().stored_dtype(), DType::BF16);
}

#[test]
fn fresh_models_are_functions_of_their_seed() {
    let config: Value =
        serde_json::from_slice(&fs::read(Fixture::open("qwen3-biased").path.join("config.json")).unwrap()).unwrap();
    let weights = |seed, dtype| random(&config, dtype, &Device::Cpu, seed, None).unwrap().named_weights();
    let (one, same, other) = (weights(1, DType::F32), weights(1, DType::F32), weights(2, DType::F32));
    let rounded = weights(1, DType::BF16);
    for (((name, a), (_, b)), ((_, c), (_, rounded))) in one.iter().zip(&same).zip(other.iter().zip(&rounded)) {
        let [a, b, c, rounded] = [a, b, c, rounded].map(|w| w.tensor().unwrap());
        assert_close(&a, &b, 0.0, name);
        assert_close(&a.to_dtype(DType::BF16).unwrap(), &rounded, 0.0, name);
        let mean = |t: &candle_core::Tensor| t.mean_all().unwrap().to_scalar::<f32>().unwrap();
        if a.rank() > 1 {
            assert!(common::relative_error(&a, &c) > 0.1, "{name}");
            let deviation = mean(&a.sqr().unwrap()).sqrt();
            assert!((deviation - 0.3).abs() < 0.03 && mean(&a).abs() < 0.05, "{name}: {deviation}");
        } else {
            let value = if name.ends_with("bias") { 0.0 } else { 1.0 };
            assert!(a.to_vec1::<f32>().unwrap().iter().all(|&x| x == value), "{name}");
        }
    }
}

#[test]
fn weights_have_the_names_and_the_order_of_the_list() {
    for fixture in Fixture::all() {
        let checkpoint = Checkpoint::open(&fixture.path).unwrap();
        let want = tensors_of(checkpoint.spec()).unwrap();
        let arena = Arena::new(&want, DType::BF16, &Device::Cpu).unwrap();
        let model = fixture.model(DType::BF16, Some(&arena));
        let got = model.named_weights();
        assert_eq!(got.len(), want.len());
        for ((got_name, weight), (name, shape)) in got.iter().zip(&want) {
            assert_eq!((got_name, weight.shape()), (name, shape));
            assert!(weight.param().is_some_and(|param| param.name() == name));
        }
        assert_eq!(arena.params().count(), want.len());
    }
}

#[test]
fn adapters_find_every_linear_layer() {
    let mut modules = Vec::new();
    Fixture::open("qwen3")
        .model(DType::F32, None)
        .for_each_linear(&mut |module, member| {
            modules.push((module.to_owned(), member.in_features(), member.out_features()));
        })
        .unwrap();
    assert_eq!(modules.len(), 14);
    assert_eq!(modules[0], ("model.layers.0.self_attn.q_proj".into(), 32, 64));
    assert_eq!(modules[13], ("model.layers.1.mlp.down_proj".into(), 56, 32));
}
