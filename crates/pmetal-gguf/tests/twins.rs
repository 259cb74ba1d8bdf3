//! GGUF files against the Hugging Face checkpoints they were converted from; see `scripts/make-gguf-fixtures.py`, which also
//! proves with llama.cpp that the files are right.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use pmetal_gguf::GgufFile;
use serde_json::{Value, json};

const CRATE: &str = env!("CARGO_MANIFEST_DIR");
const NAMES: [&str; 5] = ["llama", "llama-biased", "llama3-rope", "qwen2-tied", "qwen3-tied-f16"];

fn checkpoint(name: &str) -> PathBuf {
    Path::new(CRATE).join("../pmetal-models/tests/fixtures").join(name)
}

fn open(name: &str) -> GgufFile {
    GgufFile::open(Path::new(CRATE).join(format!("tests/fixtures/{name}.gguf"))).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn weights_are_those_of_the_checkpoint() {
    for name in NAMES {
        let file = open(name);
        let path = checkpoint(name).join("model.safetensors");
        let expected: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let listed = file.hf_tensors().unwrap();
        assert_eq!(listed.len(), expected.len(), "{name}");
        for (weight, shape) in listed {
            let wanted = &expected[&weight];
            let found = file.hf_tensor(&weight, DType::F32).unwrap();
            assert_eq!((found.dims(), shape), (wanted.dims(), wanted.dims()), "{name}: {weight}");
            assert_eq!(numbers(&found), numbers(wanted), "{name}: {weight}");
        }
    }
}

#[test]
fn configs_are_those_of_the_checkpoint() {
    for name in NAMES {
        let found = open(name).hf_config().unwrap();
        let text = std::fs::read_to_string(checkpoint(name).join("config.json")).unwrap();
        let wanted: Value = serde_json::from_str(&text).unwrap();
        for key in [
            "architectures",
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "hidden_act",
            "rms_norm_eps",
            "max_position_embeddings",
            "vocab_size",
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "dtype",
        ] {
            // A key another family has no use for.
            let Some(wanted) = wanted.get(key) else { continue };
            assert_eq!(&found[key], wanted, "{name}: {key}");
        }
        let theta = wanted.pointer("/rope_parameters/rope_theta").or(wanted.get("rope_theta")).unwrap();
        assert_eq!(&found["rope_theta"], theta, "{name}");
        assert_eq!(found["bos_token_id"], Value::Null);
    }
    assert_eq!(open("llama").hf_config().unwrap()["rope_scaling"], Value::Null);
}

/// Divisors by the formula of `llama3` scaling: 64 original positions, factor 8, band edges 1 and 4, theta 10,000, head size 16.
#[test]
fn llama3_scaling_comes_out_as_divisors() {
    let scaling = open("llama3-rope").hf_config().unwrap()["rope_scaling"].clone();
    assert_eq!(scaling["rope_type"], json!("pmetal_factors"));
    let factors = scaling["factors"].as_array().unwrap();
    assert_eq!(factors.len(), 8);
    for (pair, factor) in factors.iter().enumerate() {
        let wavelength = std::f64::consts::TAU * 10_000_f64.powf(pair as f64 / 8.0);
        let smooth = ((64.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
        let wanted = 1.0 / ((1.0 - smooth) / 8.0 + smooth);
        assert!((factor.as_f64().unwrap() - wanted).abs() < 1e-6 * wanted, "{pair}: {factor} {wanted}");
    }
}

#[test]
fn an_unknown_weight_is_missing() {
    for name in ["model.layers.9.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight", "visual.patch", ""]
    {
        let error = open("llama").hf_tensor(name, DType::F32).unwrap_err().to_string();
        assert!(error.contains("is missing"), "{error}");
    }
}
