//! What is refused, and what the messages name.

mod common;

use std::{fs, path::Path};

use candle_core::{DType, Device};
use common::Fixture;
use pmetal_models::{AttentionKind, Checkpoint, DecoderSpec, Error, HeadsSpec, load, spec_of};
use serde_json::{Value, json};

fn message(path: &Path) -> String {
    Checkpoint::open(path).err().expect("is refused").to_string()
}

/// A copy of a fixture's model that a test may break.
fn copy_of(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(Fixture::open(name).path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    folder
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Writes `model.safetensors` anew with the tensors that `change` leaves.
fn rewrite(folder: &Path, change: impl FnOnce(&mut std::collections::HashMap<String, candle_core::Tensor>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = common::tensors(&path);
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, &path).unwrap();
}

#[test]
fn paths_that_hold_no_model() {
    let folder = tempfile::tempdir().unwrap();
    assert!(message(&folder.path().join("nowhere")).contains("nowhere does not exist; give a"));
    assert!(message(folder.path()).contains("found nothing"));
    fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    assert!(message(folder.path()).contains("found pytorch_model.bin"));
    assert!(matches!(Checkpoint::open(&folder.path().join("pytorch_model.bin")), Err(Error::NotAModel { .. })));
    fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(message(folder.path()).contains("config.json: is no JSON: EOF"));
    for name in ["a.gguf", "b.gguf"] {
        fs::write(folder.path().join(name), "x").unwrap();
    }
    fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(message(folder.path()).contains("2 .gguf files"));
    fs::remove_file(folder.path().join("b.gguf")).unwrap();
    assert!(message(folder.path()).contains("a.gguf"), "{}", message(folder.path()));
}

#[test]
fn a_folder_with_a_configuration_and_no_weights() {
    let folder = copy_of("llama");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(message(folder.path()).contains("found config.json"), "{}", message(folder.path()));
}

#[test]
fn an_unknown_architecture_is_named_with_those_known() {
    let folder = copy_of("llama");
    edit(&folder.path().join("config.json"), |config| config["model_type"] = json!("mamba"));
    let message = message(folder.path());
    assert!(
        message.contains("architecture mamba") && message.contains("llama, llama4_text, qwen2, qwen3"),
        "{message}"
    );
}

#[test]
fn a_truncated_file_names_the_tensor_and_the_bytes() {
    let folder = copy_of("llama");
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 1, 7, 8, 9, header - 1, header, header + 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let Err(Error::Truncated { what, expected, found, .. }) = Checkpoint::open(folder.path()) else {
            panic!("{length} of {} bytes: {}", whole.len(), message(folder.path()));
        };
        assert!(found < expected, "{length}: {found} of {expected}");
        assert_eq!(what.starts_with("tensor "), length >= header, "{length}: {what}");
    }
}

#[test]
fn headers_that_lie() {
    let folder = copy_of("llama");
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let with_length = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
    fs::write(&path, with_length(u64::MAX)).unwrap();
    assert!(message(folder.path()).contains("is no safetensors file"));
    fs::write(&path, with_length(90_000_000)).unwrap();
    assert!(message(folder.path()).contains("the header needs 90000008 bytes"));
    fs::write(&path, with_length(20)).unwrap();
    assert!(message(folder.path()).contains("header: "));
    let header = br#"{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}"#;
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header].concat()).unwrap();
    assert!(message(folder.path()).contains("header: "), "{}", message(folder.path()));
}

#[test]
fn missing_misshapen_extra_and_foreign_tensors() {
    let folder = copy_of("llama");
    let name = "model.layers.1.self_attn.k_proj.weight";
    rewrite(folder.path(), |tensors| drop(tensors.remove(name)));
    let text = message(folder.path());
    assert!(text.contains(name) && text.contains("is missing, expected [16, 32]"), "{text}");

    let folder = copy_of("llama");
    rewrite(folder.path(), |tensors| {
        let wrong = tensors[name].narrow(0, 0, 8).unwrap().contiguous().unwrap();
        tensors.insert(name.into(), wrong);
    });
    let text = message(folder.path());
    assert!(text.contains("is [8, 32], expected [16, 32]") && text.contains("model.safetensors"), "{text}");

    let folder = copy_of("llama");
    rewrite(folder.path(), |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.0.self_attn.q_norm.weight".into(), norm);
    });
    assert!(message(folder.path()).contains("no place for tensor model.layers.0.self_attn.q_norm.weight"));

    let folder = copy_of("llama");
    rewrite(folder.path(), |tensors| {
        let integers = tensors[name].to_dtype(DType::I64).unwrap();
        tensors.insert(name.into(), integers);
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = load(&checkpoint, DType::F32, &Device::Cpu, None).err().unwrap().to_string();
    assert!(error.contains(name) && error.contains("is I64"), "{error}");
}

#[test]
fn tensors_without_a_use_are_ignored() {
    let folder = copy_of("llama-tied");
    rewrite(folder.path(), |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), norm.clone());
        tensors.insert("model.layers.2.input_layernorm.weight".into(), norm);
        tensors.insert("lm_head.weight".into(), embedding);
    });
    assert!(Checkpoint::open(folder.path()).unwrap().spec().tie_word_embeddings);

    // a head that differs from the embedding is one of its own, whatever the configuration says
    rewrite(folder.path(), |tensors| {
        let other = (&tensors["model.embed_tokens.weight"] * 2.0).unwrap();
        tensors.insert("lm_head.weight".into(), other);
    });
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(!checkpoint.spec().tie_word_embeddings);
    assert_eq!(checkpoint.config()["tie_word_embeddings"], false);
    let model = load(&checkpoint, DType::F32, &Device::Cpu, None).unwrap();
    let hidden = candle_core::Tensor::ones((1, 32), DType::F32, &Device::Cpu).unwrap();
    let logits = model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let embedding = common::tensors(&folder.path().join("model.safetensors"))["model.embed_tokens.weight"].clone();
    let sums = embedding.sum(1).unwrap().to_vec1::<f32>().unwrap();
    assert!(logits.iter().zip(sums).all(|(got, sum)| (got - 2.0 * sum).abs() < 1e-4));
}

#[test]
fn broken_indices() {
    let folder = copy_of("llama-sharded-bf16");
    let index = folder.path().join("model.safetensors.index.json");
    let name = "model.norm.weight";
    for (file, reason) in [
        (json!("../model.safetensors"), "no file name in this folder"),
        (json!("gone.safetensors"), "gone.safetensors, which does not exist"),
    ] {
        let folder = copy_of("llama-sharded-bf16");
        edit(&folder.path().join("model.safetensors.index.json"), |json| json["weight_map"][name] = file);
        assert!(message(folder.path()).contains(reason), "{}", message(folder.path()));
    }
    edit(&index, |json| json["weight_map"]["model.layers.9.x.weight"] = json["weight_map"][name].clone());
    assert!(message(folder.path()).contains("model.layers.9.x.weight is not in its file"));
    fs::write(&index, "{}").unwrap();
    assert!(message(folder.path()).contains("weight_map"));
}

fn refused(changes: Value) -> String {
    let mut config = json!({"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96});
    spec_of(&config).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    spec_of(&config).err().unwrap_or_else(|| panic!("{changes} is taken")).to_string()
}

#[test]
fn what_a_configuration_asks_for_in_vain_is_named() {
    for (changes, named) in [
        (json!({"layer_types": ["full_attention", "linear_attention"]}), "linear_attention"),
        (json!({"hidden_act": "gelu"}), "hidden_act: gelu"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"rope_scaling": {"type": "mrope", "factor": 4.0}}), "mrope"),
        (json!({"hidden_size": "many"}), r#"hidden_size: expected a whole number from 1 to 67108864, found "many""#),
        (json!({"hidden_size": null}), "hidden_size: is missing"),
        (json!({"num_hidden_layers": 1u64 << 40}), "num_hidden_layers"),
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 does not divide 4 heads"),
        (json!({"head_dim": 7}), "head_dim: 7"),
        (
            json!({"hidden_size": 1 << 24, "head_dim": 16, "intermediate_size": 1 << 26}),
            "hidden_size: with the other sizes",
        ),
        (json!({"model_type": 5}), "model_type"),
    ] {
        let message = refused(changes);
        assert!(message.contains(named), "{message}, which does not name {named}");
    }
}

#[test]
fn what_a_family_means_where_a_configuration_is_silent() {
    let spec = |model_type: &str, changes: Value| {
        let mut config = json!({"model_type": model_type, "hidden_size": 64, "intermediate_size": 56,
            "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 96});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        spec_of(&config).unwrap()
    };
    let (llama, qwen2, qwen3) = (spec("llama", json!({})), spec("qwen2", json!({})), spec("qwen3", json!({})));
    assert_eq!([&llama, &qwen2, &qwen3].map(|spec| heads(spec).attention.head_dim), [2, 2, 128]);
    assert_eq!(
        [&llama, &spec("llama", json!({"num_key_value_heads": null}))].map(|spec| heads(spec).attention.kv_heads),
        [32, 32]
    );
    assert_eq!([llama.max_position_embeddings, qwen3.max_position_embeddings], [2048, 32768]);
    let (qwen2, qwen3) = (heads(&qwen2), heads(&qwen3));
    assert!(qwen2.bias.qkv && !qwen2.bias.output && !qwen3.bias.qkv && qwen3.head_norm.is_some());
    // windows that no layer uses are nothing to refuse
    spec("qwen2", json!({"use_sliding_window": true, "max_window_layers": 2, "sliding_window": 4096}));
    spec("qwen2", json!({"use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 0}));
    let mut by_class = json!({"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 56,
        "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 96});
    assert_eq!(spec_of(&by_class).unwrap().model_type, "qwen3");
    by_class["architectures"] = json!(["GPT2LMHeadModel"]);
    assert!(spec_of(&by_class).unwrap_err().to_string().contains("GPT2LMHeadModel"));
}

#[test]
fn lists_for_each_layer_and_numbers_of_experts_fit_the_rest() {
    let refused = |model_type: &str, changes: Value| {
        let mut config = json!({"model_type": model_type, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8});
        spec_of(&config).unwrap();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        spec_of(&config).err().unwrap_or_else(|| panic!("{model_type} takes {changes}")).to_string()
    };
    let text = |kind: &str, count: usize| json!(vec![kind; count]);
    for (model_type, changes, named) in [
        (
            "llama4_text",
            json!({"layer_types": text("chunked_attention", 2)}),
            "layer_types: has 2 entries for 3 layers",
        ),
        ("llama4_text", json!({"layer_types": text("linear_attention", 3)}), "linear_attention is not supported"),
        ("llama4_text", json!({"layer_types": 5}), "layer_types: expected a list of texts"),
        ("llama4_text", json!({"no_rope_layers": [1, 0]}), "no_rope_layers: has 2 entries for 3 layers; restore"),
        ("gpt_oss", json!({"layer_types": text("full_attention", 4)}), "layer_types: has 4 entries"),
        ("deepseek_v32", json!({"mlp_layer_types": ["dense"]}), "mlp_layer_types: has 1 entries"),
        ("deepseek_v3", json!({"mlp_layer_types": text("odd", 3)}), "mlp_layer_types: odd is not supported"),
        ("deepseek_v3", json!({"n_shared_experts": 1u64 << 60}), "n_shared_experts: expected a whole number up to"),
        ("deepseek_v3", json!({"n_group": 3}), "n_group: 3 groups"),
        ("mixtral", json!({"num_local_experts": 1 << 26}), "num_local_experts: 67108864 is more than"),
        ("mixtral", json!({"num_experts_per_tok": 5}), "num_experts_per_tok: 5 of 4 experts"),
        ("gemma2", json!({"attn_logit_softcapping": 1e308}), "attn_logit_softcapping: expected a number above 0"),
    ] {
        let message = refused(model_type, changes);
        assert!(message.contains(named), "{message}, which does not name {named}");
    }
}

#[test]
fn a_rope_that_is_null_is_the_familys_own() {
    let spec = |rope: Value| {
        let mut config = json!({"model_type": "gpt_oss", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1,
            "num_attention_heads": 8, "vocab_size": 96});
        config.as_object_mut().unwrap().extend(rope.as_object().unwrap().clone());
        spec_of(&config).unwrap()
    };
    let own = spec(json!({}));
    for rope in [json!({"rope_scaling": null}), json!({"rope_scaling": {}}), json!({"rope_parameters": null})] {
        assert_eq!(spec(rope).ropes, own.ropes);
    }
    assert_ne!(spec(json!({"rope_parameters": {}})).ropes, own.ropes);
}

fn heads(spec: &DecoderSpec) -> HeadsSpec {
    match &spec.layers[0].attention {
        AttentionKind::Heads(heads) => heads.clone(),
        AttentionKind::Latent(_) => panic!("{spec:?}"),
    }
}
