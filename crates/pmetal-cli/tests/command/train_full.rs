//! `pmetal train --fine-tune-type full`: a model comes out, and the command opens it.

use std::fs;

use serde_json::json;

use crate::common::{Space, chat_model, gguf, logits, metrics, model, quickstart, read_json, rows, succeed, tensors};

/// Two steps on every weight; the folder with the model.
fn train(space: &Space, base: &str, dataset: &str, dtype: &str, more: &[&str]) -> String {
    let output = space.path(&format!("out-{dtype}"));
    let args = ["train", "--model", base, "--dataset", dataset, "--output", &output, "--fine-tune-type", "full"];
    let settings = ["--max-steps", "2", "--learning-rate", "1e-3", "--dtype", dtype];
    succeed([&args[..], &settings, more].concat());
    output
}

#[test]
fn the_model_that_is_written_opens_and_differs_from_the_base() {
    for base in [model("llama"), model("qwen2-tied"), model("llama-sharded-bf16"), gguf("llama"), gguf("qwen2-tied")] {
        let space = Space::new();
        let before = logits(&space, &["--model", &base]);
        for (dtype, stored) in [("f32", "float32"), ("bf16", "bfloat16")] {
            let output = train(&space, &base, &rows(), dtype, &[]);
            assert_eq!(read_json(format!("{output}/config.json"))["dtype"], stored);
            assert_eq!(metrics(&output).len(), 2);
            let after = logits(&space, &["--model", &output]);
            assert!(after.keys().eq(before.keys()) || after.len() == before.len());
            assert_ne!(after, before);
        }
    }
}

#[test]
fn a_checkpoint_and_its_gguf_file_train_to_the_same_weights() {
    let space = Space::new();
    let folder = train(&space, &model("llama"), &rows(), "f32", &[]);
    let from_folder = tensors(format!("{folder}/model.safetensors"));
    let file = train(&space, &gguf("llama"), &rows(), "f32", &[]);
    assert_eq!(from_folder, tensors(format!("{file}/model.safetensors")));
}

#[test]
fn the_tokenizer_and_the_generation_settings_come_along() {
    let space = Space::new();
    let output = train(&space, &chat_model(), &quickstart("heldout.jsonl"), "bf16", &["--batch-size", "2"]);
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(fs::exists(format!("{output}/{name}")).unwrap(), "{name}");
    }
    let ask =
        ["infer", "--chat", "--max-tokens", "4", "--prompt", "Please pack two orange kites for Carla.", "--model"];
    assert!(!succeed([&ask[..], &[&output]].concat()).stdout.trim().is_empty());
}

#[test]
fn a_configuration_alone_is_a_start() {
    let space = Space::new();
    space.write("new/config.json", fs::read(format!("{}/config.json", model("qwen3"))).unwrap());
    let output = train(&space, &space.path("new"), &rows(), "f32", &["--from-scratch"]);
    let logits = logits(&space, &["--model", &output]);
    assert_eq!(logits["logits.1"].len(), 2 * 96);
    assert_eq!(read_json(format!("{output}/config.json"))["architectures"], json!(["Qwen3ForCausalLM"]));
}
