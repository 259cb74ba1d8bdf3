//! A GGUF file of each family, made by llama.cpp's own converter, against the Hugging Face checkpoint it was made from; see
//! `scripts/make-gguf-fixtures.py`.

mod checkpoint;

use std::collections::HashSet;
use std::path::Path;

use candle_core::DType;
use checkpoint::{Checkpoint, numbers, part};
use pmetal_gguf::GgufFile;
use serde_json::{Value, json};

/// The file's name, and keys of the configuration that llama.cpp's metadata cannot hold as they are there.
const FILES: [(&str, &[&str]); 18] = [
    ("llama-yarn-factor-hub", &[]),
    ("mistral-window-hub", &["sliding_window"]),
    ("mixtral-hub", &["sliding_window"]),
    ("llama4-text-hub", &["use_qk_norm"]),
    ("llama4-text", &[]),
    ("qwen3-moe", &[]),
    ("deepseek-v3", &["mscale"]),
    ("deepseek-v32", &["mscale"]),
    ("gemma2", &["query_pre_attn_scalar"]),
    ("gemma3-text-hub", &["query_pre_attn_scalar"]),
    ("phi3-longrope-partial-hub", &[]),
    ("phi3-window-hub", &[]),
    ("gpt-oss", &["swiglu_limit"]),
    ("gpt-oss-mxfp4-hub", &[]),
    ("granite-tied-hub", &[]),
    ("granitemoe-tied-hub", &[]),
    ("cohere", &[]),
    ("cohere2-hub", &[]),
];

/// Keys that must come through where the checkpoint has them: another value than the class's would be lost without a word.
const NUMBERS: [&str; 48] = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "layer_norm_eps",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_local_base_freq",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "hidden_activation",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
    "interleave_moe_layer_step",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
];

fn open(name: &str) -> GgufFile {
    GgufFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.gguf"))).unwrap()
}

#[test]
fn weights_are_those_of_the_checkpoint() {
    for (name, _) in FILES {
        let (file, checkpoint) = (open(name), Checkpoint::open(name));
        let mut used = HashSet::new();
        for (weight, shape) in file.hf_tensors().unwrap() {
            let wanted = checkpoint.wanted(&weight, &mut used);
            let found = file.hf_tensor(&weight, DType::F32).unwrap();
            assert_eq!((found.dims(), shape), (wanted.dims(), wanted.dims()), "{name}: {weight}");
            assert!(numbers(&found) == numbers(&wanted), "{name}: {weight}: {found} {wanted}");
        }
        let unused: Vec<_> = checkpoint.tensors.keys().filter(|tensor| !used.contains(*tensor)).collect();
        assert!(unused.is_empty(), "{name}: {unused:?}");
    }
}

#[test]
fn an_expert_is_its_part_of_the_whole() {
    for (name, parts) in
        [("gpt-oss-mxfp4-hub", 12), ("gpt-oss", 12), ("granitemoe-tied-hub", 6), ("llama4-text-hub", 9)]
    {
        let file = open(name);
        let experts = file.hf_tensors().unwrap().into_iter().filter(|(weight, _)| weight.contains(".experts."));
        let mut compared = 0;
        for (weight, shape) in experts {
            let whole = file.hf_tensor(&weight, DType::BF16).unwrap();
            for expert in 0..shape[0] {
                let slice = file.hf_slice(&weight, expert, DType::BF16).unwrap();
                assert_eq!((slice.dims(), slice.dtype()), (&shape[1..], DType::BF16), "{name}: {weight}");
                assert_eq!(numbers(&slice), numbers(&part(&whole, expert)), "{name}: {weight}");
            }
            assert!(file.hf_slice(&weight, shape[0], DType::BF16).is_err(), "{name}: {weight}");
            compared += 1;
        }
        assert_eq!(compared, parts, "{name}");
    }
    let reordered = open("mixtral-hub").hf_slice("model.layers.0.self_attn.q_proj.weight", 0, DType::F32);
    assert!(reordered.is_err());
}

/// Every key that is found has the checkpoint's value, and every number of the checkpoint is found.
#[test]
fn configs_are_those_of_the_checkpoint() {
    for (name, other) in FILES {
        let found = open(name).hf_config().unwrap();
        let wanted = as_hub(Checkpoint::open(name).config);
        for (key, value) in found.as_object().unwrap() {
            let skipped = ["dtype", "bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling"];
            let wanted = wanted.get(key).filter(|wanted| !wanted.is_null() || value.is_null());
            if !skipped.contains(&key.as_str()) && !other.contains(&key.as_str()) {
                assert!(wanted.is_none_or(|wanted| same(value, wanted)), "{name}: {key}: {value} {wanted:?}");
            }
        }
        for key in NUMBERS.into_iter().filter(|key| wanted.get(key).is_some_and(|wanted| !wanted.is_null())) {
            assert!(found.get(key).is_some(), "{name}: {key}");
        }
        compare_scaling(name, &found["rope_scaling"], &wanted["rope_scaling"], other);
    }
}

fn compare_scaling(name: &str, found: &Value, wanted: &Value, other: &[&str]) {
    let kind = |scaling: &Value| scaling.get("rope_type").or(scaling.get("type")).cloned();
    if kind(wanted) == Some(json!("llama3")) {
        assert_eq!(kind(found), Some(json!("pmetal_factors")), "{name}");
        return;
    }
    assert_eq!(kind(found), kind(wanted), "{name}");
    // phi3's own, which stands beside it
    let elsewhere = ["type", "rope_type", "original_max_position_embeddings"];
    for (key, wanted) in wanted.as_object().into_iter().flatten() {
        if !elsewhere.contains(&key.as_str()) && !other.contains(&key.as_str()) {
            assert!(same(&found[key], wanted), "{name}: rope_scaling.{key}: {} {wanted}", found[key]);
        }
    }
}

/// The keys of the hub's files: `rope_theta`, `rope_scaling`, `num_experts` of Qwen's.
fn as_hub(mut config: Value) -> Value {
    if let Some(Value::Object(mut rope)) = config["rope_parameters"].as_object().cloned().map(Value::Object) {
        config["rope_theta"] = rope.remove("rope_theta").unwrap_or_default();
        let plain = rope["rope_type"] == "default";
        config["rope_scaling"] = if plain { Value::Null } else { Value::Object(rope) };
    }
    if config["model_type"] == "qwen3_moe"
        && let Some(experts) = config.as_object_mut().and_then(|config| config.remove("num_local_experts"))
    {
        config["num_experts"] = experts;
    }
    // what the hub's files of DeepSeek lack, and are 6 there: the size of a head's rotated part
    if config.get("qk_rope_head_dim").is_some() {
        config["head_dim"] = Value::Null;
    }
    config
}

fn same(found: &Value, wanted: &Value) -> bool {
    match (found, wanted) {
        (Value::Number(found), Value::Number(wanted)) => found.as_f64() == wanted.as_f64(),
        (Value::Array(found), Value::Array(wanted)) => {
            found.len() == wanted.len() && found.iter().zip(wanted).all(|(found, wanted)| same(found, wanted))
        }
        _ => found == wanted,
    }
}
