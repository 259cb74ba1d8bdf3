//! Adapters, broken one way at a time.

use std::fs;

use serde_json::{Value, json};

use crate::common::{Space, gguf, model, rows, says, told_about};

/// What `pmetal logits` says about an adapter of the fixture `llama`.
fn attaching(space: &Space, adapter: &str) -> String {
    told_about(space, &model("llama"), &["--lora", adapter])
}

#[test]
fn settings_that_are_wrong_or_not_supported() {
    let space = Space::new();
    let cases: &[(&str, Value, &[&str])] = &[
        ("r", json!("4"), &["r is missing or no whole number", "restore the adapter's own file"]),
        ("r", json!(0), &["lora_r is 0, expected from 1"]),
        ("r", json!(1_000_000_000), &["lora_r is 1000000000"]),
        ("r", json!(8), &["is [4, 32], this model needs [8, 32]", "give that as --model"]),
        ("lora_alpha", json!("x"), &["lora_alpha is \"x\", expected a number"]),
        ("lora_alpha", json!(-1), &["lora_alpha is -1, expected a positive number"]),
        ("lora_dropout", json!(2), &["lora_dropout is 2"]),
        ("peft_type", json!("IA3"), &["peft_type is \"IA3\", expected \"LORA\""]),
        ("peft_type", json!(null), &["peft_type is null"]),
        ("target_modules", json!(5), &["target_modules is 5, expected a list of names"]),
        ("target_modules", json!(null), &["target_modules is missing"]),
        ("use_rslora", json!("yes"), &["use_rslora is \"yes\", expected true or false"]),
        ("use_dora", json!(true), &["use_dora = true is not supported", "use an adapter without it"]),
        ("bias", json!("all"), &["bias = \"all\" is not supported"]),
        ("rank_pattern", json!({"q_proj": 8}), &["q_proj.lora_A.weight is [4, 32], this model needs [8, 32]"]),
        ("rank_pattern", json!({"q.*": 8}), &["rank_pattern = {\"q.*\": 8}", "not supported"]),
        ("alpha_pattern", json!({"q_proj": -1}), &["alpha_pattern is -1 for q_proj, expected positive numbers"]),
        ("layers_to_transform", json!([0]), &["layers_to_transform"]),
        ("fan_in_fan_out", json!(true), &["fan_in_fan_out"]),
    ];
    for (key, value, parts) in cases {
        let file = "adapter_config.json";
        let copy = space.edited(&model("llama/adapter"), "edited", file, |config| config[*key] = value.clone());
        let message = attaching(&space, &copy);
        says(&message, &["edited/adapter_"]);
        says(&message, parts);
    }
    let text = fs::read_to_string(format!("{}/adapter_config.json", model("llama/adapter"))).unwrap();
    for (contents, parts) in [
        (text.replace("\"lora_alpha\": ", "\"lora_alpha\": NaN, \"x\": "), "is no JSON"),
        ("[]".to_owned(), "peft_type is missing"),
        (String::new(), "is no JSON: EOF"),
    ] {
        let copy = space.copy(&model("llama/adapter"), "config");
        space.write("config/adapter_config.json", contents);
        says(&attaching(&space, &copy), &["config/adapter_config.json", parts, "restore the adapter's own file"]);
    }
}

#[test]
fn tensors_that_do_not_belong() {
    let space = Space::new();
    let whole = fs::read(format!("{}/adapter_model.safetensors", model("llama/adapter"))).unwrap();
    let (length, rest) = whole.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).unwrap();
    let name = header.as_object().unwrap().keys().find(|name| name.ends_with("lora_A.weight")).unwrap().clone();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut header = header.clone();
        change(&mut header);
        let header = header.to_string();
        let copy = space.copy(&model("llama/adapter"), "tensors");
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
        space.write("tensors/adapter_model.safetensors", file);
        let message = attaching(&space, &copy);
        says(&message, &["tensors/adapter_model.safetensors"]);
        message
    };
    let module = name.trim_start_matches("base_model.model.").trim_end_matches(".lora_A.weight");
    let rename = |to: &str| {
        with(&|header| {
            let info = header.as_object_mut().unwrap().remove(&name).unwrap();
            header[to] = info;
        })
    };
    says(&rename("x"), &[&format!("{module}.lora_A.weight is missing"), "it was trained on", "give that as --model"]);
    says(
        &with(&|header| header[&name]["dtype"] = json!("I32")),
        &[module, "lora_A.weight is I32, expected f32", "save the adapter"],
    );
    says(&with(&|header| header[&name]["dtype"] = json!("F16")), &["truncated", "fetch or train the adapter again"]);
    for (contents, parts) in [
        (b"".as_slice(), "fetch or train the adapter again"),
        (b"PK\x03\x04adapter_model.bin", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x02\0\0\0\0\0\0\0{}", "it has no tensors"),
    ] {
        let copy = space.copy(&model("llama/adapter"), "other");
        space.write("other/adapter_model.safetensors", contents);
        says(&attaching(&space, &copy), &["other/adapter_model.safetensors", parts]);
    }
}

#[test]
fn places_without_an_adapter() {
    let space = Space::new();
    let nowhere = space.path("nowhere");
    says(&attaching(&space, &nowhere), &[&nowhere, "does not exist", "no id of the hub"]);
    says(&attaching(&space, &model("llama")), &["is no adapter", "it is a model: give it as --model"]);
    says(&attaching(&space, &gguf("llama")), &["is no safetensors file but a GGUF file"]);
    says(&attaching(&space, &rows()), &["rows.jsonl", "no safetensors file"]);
    says(&attaching(&space, &format!("{}/model.safetensors", model("llama"))), &["give the adapter's folder"]);
    let without = |name: &str| {
        let copy = space.copy(&model("llama/adapter"), "without");
        fs::rename(space.path(&format!("without/{name}")), space.path("moved")).unwrap();
        attaching(&space, &copy)
    };
    says(&without("adapter_config.json"), &["adapter_config.json is missing", "fetch the adapter again"]);
    says(&without("adapter_model.safetensors"), &["adapter_model.safetensors is missing", "fetch the adapter again"]);
    space.write("pickled/adapter_config.json", "{}");
    space.write("pickled/adapter_model.bin", "");
    says(&attaching(&space, &space.path("pickled")), &["a pickle, which is never read"]);
}
