//! `--rope-scaling`: the same as a configuration that says so, in running, training and what training writes.

use serde_json::{Value, json};

use crate::common::{Space, chat_model, logits, model, quickstart, read_json, refused, rows, says, succeed};

const YARN: &str = "yarn:4";

/// The fixture `llama`, whose context is 256 tokens, with other settings.
fn edited(space: &Space, name: &str, scaling: &Value) -> String {
    space.edited(&model("llama"), name, "config.json", |config| config["rope_scaling"] = scaling.clone())
}

#[test]
fn logits_are_those_of_a_model_whose_configuration_says_so() {
    let space = Space::new();
    let base = model("llama");
    let plain = logits(&space, &["--model", &base]);
    for (text, scaling) in [
        (YARN, json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})),
        ("linear:2.5", json!({"type": "linear", "factor": 2.5})),
        (r#"{"type": "yarn", "factor": 8, "beta_fast": 4}"#, json!({"type": "yarn", "factor": 8, "beta_fast": 4})),
    ] {
        let scaled = logits(&space, &["--model", &base, "--rope-scaling", text]);
        assert_ne!(scaled, plain, "{text}");
        let folder = edited(&space, "scaled", &scaling);
        assert_eq!(scaled, logits(&space, &["--model", &folder]), "{text}");
        assert_eq!(plain, logits(&space, &["--model", &folder, "--rope-scaling", "none"]), "{text}");
    }
}

#[test]
fn a_trained_model_carries_it() {
    let space = Space::new();
    let (base, output) = (model("llama"), space.path("out"));
    let args = ["train", "--model", &base, "--dataset", &rows(), "--output", &output, "--fine-tune-type", "full"];
    succeed([&args[..], &["--max-steps", "1", "--dtype", "f32", "--rope-scaling", YARN]].concat());
    let config = read_json(format!("{output}/config.json"));
    let settings =
        [&config["rope_scaling"], &config["rope_parameters"]].into_iter().find(|settings| settings.is_object());
    let settings = settings.unwrap();
    assert_eq!([&settings["rope_type"], &settings["factor"]], [&json!("yarn"), &json!(4.0)]);
    assert_eq!(config["max_position_embeddings"], 1024);
    // as it is written, it needs no flag
    let again = logits(
        &space,
        &[
            "--model",
            &output,
            "--rope-scaling",
            r#"{"type": "yarn", "factor": 4, "original_max_position_embeddings": 256}"#,
        ],
    );
    assert_eq!(logits(&space, &["--model", &output]), again);
}

#[test]
fn training_on_it_differs_and_repeats_as_a_configuration() {
    let space = Space::new();
    let train = |base: &str, name: &str, more: &[&str]| {
        let output = space.path(name);
        let args = ["train", "--model", base, "--dataset", &rows(), "--output", &output, "--max-steps", "1"];
        succeed([&args[..], &["--dtype", "f32"], more].concat());
        crate::common::metrics(&output)[0]["loss"].clone()
    };
    let flag = train(&model("llama"), "flag", &["--rope-scaling", "linear:8"]);
    let config = train(&edited(&space, "scaled", &json!({"type": "linear", "factor": 8})), "config", &[]);
    assert_eq!(flag, config);
    assert_ne!(flag, train(&model("llama"), "plain", &[]));
}

#[test]
fn it_lengthens_what_infer_reads() {
    let space = Space::new();
    let short = space.edited(&chat_model(), "short", "config.json", |c| c["max_position_embeddings"] = json!(8));
    let ask = ["infer", "--model", &short, "--prompt", "Please pack two orange kites for Carla.", "--max-tokens", "1"];
    says(&refused(1, ask), &["the model's context 8"]);
    for text in ["yarn:64", "linear:64"] {
        succeed([&ask[..], &["--rope-scaling", text]].concat());
    }
}

#[test]
fn what_is_no_scaling_is_bad_usage() {
    let space = Space::new();
    let (ids, output) = (space.write("ids.json", "[[1]]"), space.path("out.safetensors"));
    let base = model("llama");
    for (text, parts) in [
        ("ntk:2", ["--rope-scaling ntk:2", "default, dynamic, linear, llama3, longrope, yarn"]),
        ("yarn", ["--rope-scaling yarn", "yarn:FACTOR"]),
    ] {
        let run = ["logits", "--model", &base, "--ids", &ids, "--output", &output, "--rope-scaling", text];
        says(&refused(2, run), &parts);
        let train =
            ["train", "--model", &base, "--dataset", &quickstart("train.jsonl"), "--rope-scaling", text, "--dry-run"];
        says(&refused(2, train), &parts);
    }
}
