//! New tokens, tables trained beside an adapter, and what of the tokenizer is kept with a run.

use std::{collections::HashSet, fs, path::Path};

use candle_core::{Device, safetensors};
use serde_json::{Value, json};

use crate::common::{Space, chat_model, model, read_json, refused, rows, says, succeed};

/// Conversations with two tokens that the chat model does not know.
fn calls(space: &Space) -> String {
    let row = |city: &str| {
        let answer = format!("<|call|>weather {city}<|result|>");
        json!({"messages": [{"role": "user", "content": city}, {"role": "assistant", "content": answer}]}).to_string()
    };
    space.write("calls.jsonl", ["Rome", "Oslo", "Lima", "Cairo"].map(row).join("\n"))
}

fn train(space: &Space, base: &str, dataset: &str, name: &str, more: &[&str]) -> (String, String) {
    let output = space.path(name);
    let args = ["train", "--model", base, "--dataset", dataset, "--output", &output, "--max-steps", "2"];
    let ran = succeed([&args[..], more].concat());
    (output, ran.stderr)
}

/// Ids in a row of the logits for `ids`.
fn width(space: &Space, ids: &str, more: &[&str]) -> usize {
    let (ids, output) = (space.write("some-ids.json", ids), space.path("some-logits.safetensors"));
    succeed([&["logits", "--ids", &ids, "--output", &output], more].concat());
    safetensors::load(output, &Device::Cpu).unwrap()["logits.0"].dims()[1]
}

fn dims(adapter: &str, name: &str) -> Vec<usize> {
    safetensors::load(format!("{adapter}/adapter_model.safetensors"), &Device::Cpu).unwrap()[name].dims().to_vec()
}

/// The texts and ids of the tokens that a folder's tokenizer.json adds, and whether they are special.
fn added(folder: &str) -> HashSet<(String, u64, bool)> {
    let json = read_json(format!("{folder}/tokenizer.json"));
    let entry = |t: &Value| Some((t["content"].as_str()?.to_owned(), t["id"].as_u64()?, t["special"].as_bool()?));
    json["added_tokens"].as_array().unwrap().iter().filter_map(entry).collect()
}

fn rows_of(base: &str) -> u64 {
    read_json(format!("{base}/config.json"))["vocab_size"].as_u64().unwrap()
}

const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";

#[test]
fn an_adapter_with_new_tokens_carries_its_tables_and_its_tokenizer() {
    let space = Space::new();
    let (base, calls) = (chat_model(), calls(&space));
    let known = rows_of(&base);
    let tokens = ["--add-tokens", "<|call|>, <|result|>,<|im_end|>"];
    let (output, told) = train(&space, &base, &calls, "out", &tokens);
    says(&told, &["in the vocabulary already: <|im_end|>", "2 new tokens", "--modules-to-save embed_tokens is on"]);
    for token in ["<|call|>", "<|result|>"] {
        assert!(added(&output).iter().any(|(text, id, special)| text == token && *id < known + 2 && *special));
    }
    let config = read_json(format!("{output}/adapter_config.json"));
    assert_eq!(config["modules_to_save"], json!(["embed_tokens", "lm_head"]));
    let width_of = |lora: &str, ids: &str| width(&space, ids, &["--model", &base, "--lora", lora]);
    let rows = dims(&output, EMBEDDING)[0];
    assert_eq!(dims(&output, "base_model.model.lm_head.weight")[0], rows);
    for lora in [output.clone(), format!("{output}/lora_weights.safetensors")] {
        assert_eq!(width_of(&lora, &format!("[[1, {}]]", rows - 1)), rows);
        let ask = ["infer", "--model", &base, "--lora", &lora, "--chat", "--prompt", "<|call|>", "--max-tokens", "2"];
        succeed(ask);
    }

    // goes on from there, with one more token and room to spare
    let more = ["--lora", &output, "--add-tokens", "<|call|>,<|more|>", "--pad-to-multiple-of", "64"];
    let (again, told) = train(&space, &base, &calls, "again", &more);
    says(&told, &["in the vocabulary already: <|call|>", "a new token, "]);
    let padded = dims(&again, EMBEDDING)[0];
    assert!(padded.is_multiple_of(64) && padded > rows, "{padded}");
    assert_eq!(added(&again).difference(&added(&output)).count(), 1);
    assert_eq!(width_of(&again, "[[1]]"), padded);
}

#[test]
fn free_rows_are_taken_before_the_tables_grow() {
    let space = Space::new();
    let calls = calls(&space);
    let grown = space.path("padded");
    let tokens = ["--add-plain-tokens", "<|call|>", "--pad-to-multiple-of", "1024", "--fine-tune-type", "full"];
    let (padded, _) = train(&space, &chat_model(), &calls, "padded", &tokens);
    assert_eq!((padded.as_str(), rows_of(&padded)), (grown.as_str(), 2048));
    assert!(added(&padded).iter().any(|(text, _, special)| text == "<|call|>" && !special));
    let (output, told) = train(&space, &padded, &calls, "out", &["--add-tokens", "<|result|>"]);
    says(&told, &["a new token, in the 2048 rows there are: <|result|> = "]);
    assert_eq!(dims(&output, EMBEDDING)[0], 2048);
}

#[test]
fn a_fully_tuned_model_grows_with_its_configuration() {
    let space = Space::new();
    let (base, calls) = (chat_model(), calls(&space));
    let list = space.write("tokens.json", r#"["<|call|>", "<|result|>"]"#);
    let (output, _) = train(&space, &base, &calls, "out", &["--fine-tune-type", "full", "--add-tokens", &list]);
    let known = rows_of(&output);
    assert!(known > rows_of(&base));
    assert_eq!(width(&space, &format!("[[{}]]", known - 1), &["--model", &output]) as u64, known);
    assert!(added(&output).iter().any(|(text, ..)| text == "<|result|>"));
}

#[test]
fn tables_are_trained_where_they_are_named() {
    let space = Space::new();
    let (base, rows) = (model("llama"), rows());
    let (plain, _) = train(&space, &base, &rows, "plain", &[]);
    let (output, _) = train(&space, &base, &rows, "out", &["--modules-to-save", "lm_head"]);
    let names = |folder: &str| -> HashSet<String> {
        let tensors = safetensors::load(format!("{folder}/adapter_model.safetensors"), &Device::Cpu).unwrap();
        tensors.into_keys().collect()
    };
    let more: Vec<String> = names(&output).difference(&names(&plain)).cloned().collect();
    assert_eq!(more, ["base_model.model.lm_head.weight"]);
    // goes on with the adapter, and trains the embedding too
    let (again, _) = train(&space, &base, &rows, "again", &["--lora", &output, "--modules-to-save", "embed_tokens"]);
    assert_eq!(names(&again).difference(&names(&output)).count(), 1);
    let config = read_json(format!("{again}/adapter_config.json"));
    assert_eq!(config["modules_to_save"], json!(["embed_tokens", "lm_head"]));
}

#[test]
fn the_prompt_that_was_trained_is_kept_with_the_adapter() {
    let space = Space::new();
    let bare = space.edited(&chat_model(), "bare", "tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let _ = fs::remove_file(Path::new(&bare).join("chat_template.jinja"));
    let alpaca = space.write("alpaca.jsonl", r#"{"instruction": "Name a city.", "output": "Rome"}"#);
    let text = space.write("text.jsonl", r#"{"text": "Rome is a city."}"#);
    let (output, _) = train(&space, &bare, &alpaca, "out", &[]);
    assert!(fs::read_to_string(format!("{output}/chat_template.jinja")).unwrap().contains("### Instruction:"));
    let prompt_tokens = |more: &[&str]| {
        let ask = ["infer", "--model", &bare, "--chat", "--prompt", "Name a city.", "--max-tokens", "1"];
        let told = succeed([&ask[..], more].concat()).stderr;
        told.split_once("prompt: ").unwrap().1.split(' ').next().unwrap().to_owned()
    };
    let kept = prompt_tokens(&["--lora", &output]);
    assert_eq!(kept, prompt_tokens(&["--chat-template", "alpaca"]));
    assert_ne!(kept, prompt_tokens(&[]));
    // a later run into the same folder brings no prompt of its own
    train(&space, &bare, &text, "out", &[]);
    assert_eq!(prompt_tokens(&["--lora", &output]), prompt_tokens(&[]));
}

#[test]
fn what_does_not_go_together_is_refused() {
    let (base, chat, rows) = (model("llama"), chat_model(), rows());
    let refuse = |base: &str, more: &[&str], parts: &[&str]| {
        let args = ["train", "--model", base, "--dataset", &rows, "--output", "/nowhere/out"];
        says(&refused(2, [&args[..], more].concat()), parts);
    };
    refuse(&chat, &["--add-tokens", "a,,b"], &["--add-tokens", "empty token"]);
    refuse(&chat, &["--pad-to-multiple-of", "64"], &["add --add-tokens"]);
    refuse(&chat, &["--pad-to-multiple-of", "0", "--add-tokens", "a"], &["at least 1"]);
    refuse(&base, &["--add-tokens", "<|call|>"], &["--add-tokens", "has no tokenizer"]);
    let full = ["--fine-tune-type", "full", "--modules-to-save", "lm_head"];
    refuse(&base, &full, &["--modules-to-save", "trains every weight"]);
}

#[test]
fn modules_that_are_no_tables_are_refused_by_name() {
    let space = Space::new();
    let (base, tied, rows, output) = (model("llama"), model("llama-tied"), rows(), space.path("out"));
    let args = |base: &str, names: &str| {
        ["train", "--model", base, "--dataset", &rows, "--output", &output, "--modules-to-save", names]
            .map(str::to_owned)
    };
    says(&refused(1, args(&tied, "lm_head")), &["name embed_tokens, which trains both"]);
    let ran = crate::common::run(args(&base, "norm"));
    assert_eq!(ran.code, Some(2));
    says(&ran.stderr, &["norm cannot be trained beside an adapter; known are embed_tokens, lm_head"]);
}
