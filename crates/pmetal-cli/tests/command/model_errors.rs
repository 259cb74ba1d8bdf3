//! Models and adapters that are not what they should be, and token ids that a model does not know.

use std::fs;

use serde_json::json;

use crate::common::{Space, chat_model, gguf, model, refused, says};

/// What `pmetal logits` says about a model.
fn opening(space: &Space, path: &str) -> String {
    let ids = space.write("ids.json", "[[1, 2, 3]]");
    let message = refused(1, ["logits", "--model", path, "--ids", &ids, "--output", &space.path("out.safetensors")]);
    assert!(!fs::exists(space.path("out.safetensors")).unwrap());
    message
}

/// What it says about an adapter of the fixture `llama`.
fn attaching(space: &Space, path: &str) -> String {
    let ids = space.write("ids.json", "[[1, 2, 3]]");
    let output = space.path("out.safetensors");
    refused(1, ["logits", "--model", &model("llama"), "--lora", path, "--ids", &ids, "--output", &output])
}

/// What it says about a file of ids.
fn ids_of(contents: &str) -> String {
    let space = Space::new();
    let ids = space.write("ids.json", contents);
    let message =
        refused(1, ["logits", "--model", &model("llama"), "--ids", &ids, "--output", &space.path("out.safetensors")]);
    says(&message, &[&ids]);
    message
}

#[test]
fn paths_without_a_model() {
    let space = Space::new();
    let nowhere = space.path("nowhere");
    says(&opening(&space, &nowhere), &[&nowhere, "does not exist"]);
    let folder = space.copy(&model("llama/adapter"), "folder");
    says(
        &opening(&space, &folder),
        &[&folder, "is no model: expected a folder with config.json", "found adapter_config"],
    );
    let file = space.write("model.bin", "x");
    says(&opening(&space, &file), &[&file, "is no model", ".gguf"]);
}

#[test]
fn safetensors_cut_anywhere() {
    let space = Space::new();
    let whole = fs::read(format!("{}/model.safetensors", model("llama"))).unwrap();
    for length in [0, 5, 8, 9, 1000, 2103, 2112, 3000, 50_000, whole.len() - 1] {
        let copy = space.copy(&model("llama"), "cut");
        let file = space.write("cut/model.safetensors", &whole[..length]);
        let message = opening(&space, &copy);
        says(&message, &[&file, "is truncated", "needs", "found", "fetch the file again"]);
    }
}

#[test]
fn shards_that_are_missing_or_cut() {
    let space = Space::new();
    let copy = space.copy(&model("llama-sharded-bf16"), "sharded");
    let shard = space.path("sharded/model-00002-of-00003.safetensors");
    let whole = fs::read(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() - 100]).unwrap();
    says(&opening(&space, &copy), &["model-00002-of-00003.safetensors is truncated"]);
    fs::remove_file(&shard).unwrap();
    says(&opening(&space, &copy), &["model-00002-of-00003.safetensors, which does not exist"]);
}

#[test]
fn gguf_files_cut_anywhere() {
    let space = Space::new();
    for name in ["llama", "qwen3-tied-f16"] {
        let whole = fs::read(gguf(name)).unwrap();
        for length in [0, 3, 4, 7, 8, 20, 24, 100, 700, 2000, 50_000, whole.len() - 1] {
            let file = space.write("cut.gguf", &whole[..length]);
            says(&opening(&space, &file), &[&file, "is truncated", "needs", "download it again"]);
        }
    }
    let other = space.write("other.gguf", "this is some other file");
    says(&opening(&space, &other), &[&other, "is not a GGUF file"]);
}

#[test]
fn configurations_that_say_no_model() {
    let space = Space::new();
    let with = |key: &str, value| {
        let copy = space.edited(&model("llama"), "edited", "config.json", |config| config[key] = value);
        opening(&space, &copy)
    };
    says(
        &with("model_type", json!("mamba")),
        &["architecture mamba is not supported", "known are llama, llama4_text, qwen2, qwen3"],
    );
    says(&with("vocab_size", json!(null)), &["config.json: vocab_size"]);
    says(&with("hidden_size", json!(1e30)), &["config.json: hidden_size"]);
    says(&with("num_key_value_heads", json!(0)), &["config.json: num_key_value_heads"]);
    says(&with("num_hidden_layers", json!(99_999_999_999_u64)), &["config.json: num_hidden_layers"]);
    says(&with("num_hidden_layers", json!(3)), &["tensor model.layers.2.", "is missing, expected [32, 32]"]);
    says(&with("hidden_size", json!(64)), &["model.safetensors: tensor", "is [96, 32], expected [96, 64]"]);
    let broken = space.copy(&model("llama"), "broken");
    for contents in ["", "{", "[]", "\u{0}"] {
        let file = space.write("broken/config.json", contents);
        says(&opening(&space, &broken), &[&file]);
    }
}

#[test]
fn adapters_that_are_none_or_of_another_model() {
    let space = Space::new();
    let nowhere = space.path("nowhere");
    says(&attaching(&space, &nowhere), &[&nowhere, "does not exist"]);
    says(&attaching(&space, &model("llama")), &["is no adapter: expected a folder with adapter_config.json"]);
    let other = attaching(&space, &model("qwen2/adapter"));
    says(&other, &["does not fit this model", "k_proj.lora_B.weight is [8, 4]", "it was trained on qwen2"]);

    let adapter = model("llama/adapter");
    let with = |key: &str, value| {
        let copy = space.edited(&adapter, "edited", "adapter_config.json", |config| config[key] = value);
        attaching(&space, &copy)
    };
    says(&with("r", json!(8)), &["lora_A.weight is [4, 32], this model needs [8, 32]"]);
    says(&with("r", json!(null)), &["adapter_config.json: r is missing"]);
    says(&with("peft_type", json!("IA3")), &["adapter_config.json: peft_type is \"IA3\", expected \"LORA\""]);
    says(&with("use_dora", json!(true)), &["adapter_config.json: use_dora = true is not supported"]);

    let cut = space.copy(&adapter, "cut");
    let whole = fs::read(format!("{adapter}/adapter_model.safetensors")).unwrap();
    for length in [0, 7, 100, 3000, whole.len() - 1] {
        let file = space.write("cut/adapter_model.safetensors", &whole[..length]);
        says(&attaching(&space, &cut), &[&file, "is truncated", "fetch or train the adapter again"]);
        says(&attaching(&space, &file), &[&file, "is truncated"]);
    }
    space.write("cut/adapter_config.json", "{");
    says(&attaching(&space, &cut), &["cut/adapter_config.json: is no JSON: EOF"]);
}

#[test]
fn lists_of_ids() {
    says(&ids_of("[[1, 2], []]"), &["list 1 (from 0) is empty"]);
    says(&ids_of("[]"), &["no list of token ids"]);
    says(&ids_of("[[1], [2, 96]]"), &["list 1 (from 0) has the id 96, the model knows the ids 0 to 95"]);
    for contents in ["[1, 2]", "{}", "x", "", "[[-1]]", "[[1.5]]", "[[\"a\"]]", "[[4294967296]]"] {
        says(&ids_of(contents), &["expected a list of lists of token ids"]);
    }
    let space = Space::new();
    let nowhere = space.path("nowhere.json");
    let output = space.path("out.safetensors");
    says(&refused(1, ["logits", "--model", &model("llama"), "--ids", &nowhere, "--output", &output]), &[&nowhere]);
}

#[test]
fn prompts_that_cannot_be_continued() {
    let long = "hello ".repeat(2000);
    let message = refused(1, ["infer", "--model", &chat_model(), "--prompt", &long]);
    says(&message, &["the prompt has", "tokens, the model's context 512"]);
    says(&refused(2, ["infer", "--model", &chat_model(), "--prompt", ""]), &["--prompt"]);
    for path in [model("llama"), gguf("llama")] {
        says(&refused(1, ["infer", "--model", &path, "--prompt", "x"]), &[&path, "has no tokenizer", "tokenizer.json"]);
    }
    let space = Space::new();
    let copy = space.edited(&chat_model(), "hot", "generation_config.json", |config| config["top_p"] = json!(7));
    let message = refused(1, ["infer", "--model", &copy, "--prompt", "x"]);
    says(&message, &["generation_config.json: top_p is 7, expected above 0 and at most 1; set it with --top-p"]);
}

#[test]
fn files_beside_the_weights() {
    let space = Space::new();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let copy = space.copy(&chat_model(), name);
        let file = space.write(&format!("{name}/{name}"), "{");
        says(&refused(1, ["infer", "--model", &copy, "--prompt", "x"]), &[&file]);
    }
    let copy =
        space.edited(&chat_model(), "eos", "generation_config.json", |config| config["eos_token_id"] = json!("x"));
    says(&refused(1, ["infer", "--model", &copy, "--prompt", "x"]), &["generation_config.json: eos_token_id"]);
}
