//! Safetensors files and the index of shards, broken one way at a time.

use std::fs;

use serde_json::{Map, Value, json};

use crate::common::{Space, model, says, told};

/// The header and the data of a safetensors file.
fn parts_of(path: &str) -> (Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

fn joined(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// What `pmetal logits` says about the fixture `llama` with other bytes in `model.safetensors`.
fn opening(contents: &[u8]) -> String {
    let space = Space::new();
    let copy = space.copy(&model("llama"), "broken");
    space.write("broken/model.safetensors", contents);
    let message = told(&space, &copy);
    says(&message, &["broken"]);
    message
}

#[test]
fn headers_that_contradict_the_file() {
    let (header, data) = parts_of(&format!("{}/model.safetensors", model("llama")));
    let with = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut header = header.clone();
        change(&mut header);
        opening(&joined(&Value::Object(header).to_string(), &data))
    };
    // the first tensor of the data, and the one behind it
    let by_place = |place: u64| {
        let at = |info: &Value| info["data_offsets"][0].as_u64();
        let mut tensors: Vec<_> = header.iter().filter(|(name, _)| *name != "__metadata__").collect();
        tensors.sort_by_key(|(_, info)| at(info));
        tensors[place as usize].0.clone()
    };
    let (first, second) = (by_place(0), by_place(1));
    let again = "fetch the file again";
    says(
        &with(&|h| h[&second]["data_offsets"] = h[&first]["data_offsets"].clone()),
        &["model.safetensors: header", again],
    );
    says(&with(&|h| h[&first]["data_offsets"] = json!([-1, 5])), &["header", again]);
    says(&with(&|h| h[&first]["data_offsets"] = json!([5, 0])), &["header", &first, again]);
    says(&with(&|h| h[&first]["data_offsets"] = json!([1_000_000, 1_012_288])), &["header", again]);
    says(&with(&|h| h[&first]["dtype"] = json!("I64")), &["header", &format!("tensor {first}"), again]);
    says(&with(&|h| h[&first]["dtype"] = json!("F5")), &["header", "unknown variant `F5`", again]);
    says(&with(&|h| h[&first]["shape"] = json!([3, 3])), &["header", &format!("tensor {first}"), again]);
    says(&with(&|h| h[&first]["shape"] = json!([4_294_967_296_u64, 4_294_967_296_u64])), &["header", &first, again]);
    says(&with(&|h| h[&first]["shape"] = json!("big")), &["header", again]);
    says(
        &with(&|h| drop(h[&first].as_object_mut().unwrap().remove("data_offsets"))),
        &["missing field `data_offsets`"],
    );
    says(&with(&|h| drop(h.remove(&first))), &["header: invalid offset for tensor", again]);
    let renamed = with(&|h| {
        let info = h.remove(&first).unwrap();
        h.insert("encoder.weight".into(), info);
    });
    says(&renamed, &[&format!("tensor {first} is missing"), "fetch both again"]);
    let turned = with(&|h| {
        let shape = h["model.embed_tokens.weight"]["shape"].as_array().unwrap();
        h["model.embed_tokens.weight"]["shape"] = json!([shape[1], shape[0]]);
    });
    says(&turned, &["is [32, 96], expected [96, 32]"]);
    let integers = with(&|h| h["model.embed_tokens.weight"]["dtype"] = json!("I32"));
    says(&integers, &["model.embed_tokens.weight is I32, expected F32, F16 or BF16"]);
    let longer = joined(&Value::Object(header.clone()).to_string(), &[&data[..], b"more"].concat());
    says(&opening(&longer), &["4 bytes behind its last tensor", again]);
}

#[test]
fn files_that_are_something_else() {
    let cases: &[(&[u8], &[&str])] = &[
        (&[0; 100], &["header: ", "fetch the file again"]),
        (b"PK\x03\x04pytorch_model/data.pkl", &["is no safetensors file but a zip archive", "save it as safetensors"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", &["Git LFS pointer", "git lfs pull"]),
        (b"<!DOCTYPE html><html>404</html>", &["a web page", "fetch it again"]),
        (b"GGUF\x03\0\0\0\0\0\0\0", &["a GGUF file", "name it .gguf"]),
        (b"some text, whatever it is", &["is no safetensors file", "fetch the file again"]),
        (&joined("[]", &[]), &["header: ", "fetch the file again"]),
        (&joined("{\"a\": nope}", &[0; 40]), &["header: ", "fetch the file again"]),
        (&joined("{}", &[]), &["is missing, expected"]),
    ];
    for (contents, parts) in cases {
        says(&opening(contents), parts);
    }
    let space = Space::new();
    let copy = space.copy(&model("llama"), "pickle");
    fs::rename(space.path("pickle/model.safetensors"), space.path("pickle/pytorch_model.bin")).unwrap();
    says(&told(&space, &copy), &["is no model", "pytorch_model.bin"]);
    fs::create_dir(space.path("pickle/model.safetensors")).unwrap();
    says(&told(&space, &copy), &["is no model"]);
}

#[test]
fn indices_that_lead_nowhere() {
    let space = Space::new();
    let name = "model.norm.weight";
    let with = |change: &dyn Fn(&mut Value)| {
        let index = "model.safetensors.index.json";
        let copy = space.edited(&model("llama-sharded-bf16"), "sharded", index, |json| change(json));
        told(&space, &copy)
    };
    says(&with(&|json| *json = json!({})), &["index.json: weight_map", "fetch it again"]);
    says(&with(&|json| json["weight_map"] = json!([])), &["weight_map: expected an object"]);
    says(&with(&|json| json["weight_map"] = json!({})), &["is missing, expected"]);
    says(&with(&|json| json["weight_map"][name] = json!(5)), &["model.norm.weight has no file name"]);
    says(
        &with(&|json| json["weight_map"][name] = json!("../elsewhere.safetensors")),
        &["has no file name in this folder"],
    );
    says(
        &with(&|json| json["weight_map"][name] = json!("gone.safetensors")),
        &["gone.safetensors, which does not exist", "fetch the model again"],
    );
    says(&with(&|json| json["weight_map"]["extra"] = json["weight_map"][name].clone()), &["extra is not in its file"]);
    let copy = space.copy(&model("llama-sharded-bf16"), "broken");
    space.write("broken/model.safetensors.index.json", "{");
    says(&told(&space, &copy), &["index.json: is no JSON", "fetch it again"]);
    fs::remove_file(space.path("broken/model.safetensors.index.json")).unwrap();
    says(&told(&space, &copy), &["is no model", "shards and their index"]);
}
