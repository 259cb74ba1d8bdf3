//! `config.json` and the files beside it, broken one way at a time.

use serde_json::{Value, json};

use crate::common::{Space, model, says, told};

/// What `pmetal logits` says about the fixture `llama` with other bytes in `config.json`.
fn opening(name: &str, contents: &[u8]) -> String {
    let space = Space::new();
    let copy = space.copy(&model("llama"), name);
    space.write(&format!("{name}/config.json"), contents);
    told(&space, &copy)
}

fn changed(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut config = crate::common::read_json(format!("{}/config.json", model("llama")));
    change(&mut config);
    config.to_string().into_bytes()
}

#[test]
fn values_that_describe_no_model() {
    let cases: &[(&str, Value, &[&str])] = &[
        (
            "hidden_size",
            json!("32"),
            &["hidden_size: expected a whole number", "found \"32\"", "restore the model's own file"],
        ),
        ("hidden_size", json!(32.5), &["hidden_size: expected a whole number", "found 32.5"]),
        ("num_hidden_layers", json!(-1), &["num_hidden_layers: expected a whole number", "found -1"]),
        ("num_hidden_layers", json!(4097), &["num_hidden_layers: 4097 is more than 1024"]),
        ("vocab_size", json!(0), &["vocab_size", "found 0"]),
        ("vocab_size", json!(67_108_864), &["vocab_size: is 67108864", "has 96 rows", "has to be 96"]),
        ("num_attention_heads", json!(true), &["num_attention_heads", "found true"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads: 3 does not divide 4 heads"]),
        ("head_dim", json!(7), &["head_dim: 7 is not an even number"]),
        ("head_dim", json!(67_108_864), &["head_dim: 67108864 is more than 65536"]),
        ("intermediate_size", json!([56]), &["intermediate_size", "found [56]"]),
        ("model_type", json!("bert"), &["config.json: architecture bert is not supported", "`pmetal models`"]),
        ("model_type", json!(5), &["model_type: expected a text, found 5"]),
        ("hidden_act", json!("gelu"), &["hidden_act: gelu is not supported, only silu", "another model"]),
        (
            "quantization_config",
            json!({"quant_method": "gptq"}),
            &["quantization_config", "unquantized model or a GGUF file"],
        ),
        ("quantization_config", json!("4bit"), &["quantization_config: expected an object"]),
        (
            "rope_scaling",
            json!({"rope_type": "mrope", "factor": 4}),
            &["rope_scaling.rope_type: mrope", "default, dynamic, linear, llama3, longrope, yarn"],
        ),
        ("rope_scaling", json!("linear"), &["rope_scaling: expected an object, found \"linear\""]),
        ("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor: is missing", "restore"]),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), &["rope_scaling.factor: expected a number above 0"]),
        ("rope_theta", json!("1e6"), &["rope_theta: expected a number above 0", "\"1e6\""]),
        ("rope_theta", json!(0), &["rope_theta"]),
        ("rms_norm_eps", json!("small"), &["rms_norm_eps: expected a number"]),
        ("rms_norm_eps", json!(-1), &["rms_norm_eps: -1 is below 0"]),
        ("max_position_embeddings", json!(0), &["max_position_embeddings"]),
        ("tie_word_embeddings", json!("yes"), &["tie_word_embeddings: expected true or false"]),
        ("eos_token_id", json!(-1), &["/config.json: eos_token_id: expected a token id"]),
        ("eos_token_id", json!(["</s>"]), &["/config.json: eos_token_id"]),
    ];
    for (key, value, parts) in cases {
        let message = opening("config", &changed(|config| config[*key] = value.clone()));
        says(&message, &["config"]);
        says(&message, parts);
    }
    for key in ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"] {
        let message = opening("config", &changed(|config| drop(config.as_object_mut().unwrap().remove(key))));
        says(&message, &["config.json", key, "is missing", "restore the model's own file"]);
    }
    let anonymous = changed(|config| {
        config.as_object_mut().unwrap().retain(|key, _| key != "model_type" && key != "architectures")
    });
    says(&opening("config", &anonymous), &["config.json: architecture (no model_type) is not supported"]);
    // of a model with several parts the text part counts
    let nested = changed(|config| {
        config["model_type"] = json!("mamba");
        *config = json!({"model_type": "llava", "text_config": config.clone()});
    });
    says(&opening("config", &nested), &["architecture mamba is not supported"]);
}

#[test]
fn bytes_that_are_no_object() {
    let text = changed(|_| ());
    let utf16: Vec<u8> = [0xff, 0xfe].into_iter().chain(text.iter().flat_map(|&byte| [byte, 0])).collect();
    let cases: &[(&[u8], &[&str])] = &[
        (b"", &["is no JSON: EOF", "restore the model's own file"]),
        (b"\0\0\0\0", &["is no JSON"]),
        (b"null", &["expected an object"]),
        (b"{\"model_type\": \"llama\",}", &["is no JSON: trailing comma"]),
        (b"{\"model_type\": NaN}", &["is no JSON"]),
        (b"<!DOCTYPE html><html></html>", &["is a web page", "fetch it again"]),
        (b"version https://git-lfs.github.com/spec/v1\n", &["is a Git LFS pointer", "git lfs pull"]),
        (&utf16, &["is text in UTF-16", "save it as UTF-8"]),
        (&b"{\"a\":".repeat(100_000), &["is no JSON: recursion limit exceeded"]),
    ];
    for (contents, parts) in cases {
        let message = opening("bytes", contents);
        says(&message, &["bytes/config.json"]);
        says(&message, parts);
    }
    let space = Space::new();
    let copy = space.copy(&model("llama"), "folder");
    std::fs::remove_file(space.path("folder/config.json")).unwrap();
    std::fs::create_dir(space.path("folder/config.json")).unwrap();
    says(&told(&space, &copy), &["folder/config.json: Is a directory"]);
}
