//! `tokenizer.json`, the files beside it and chat templates, broken one way at a time.

use std::fs;

use serde_json::{Value, json};

use crate::common::{Space, chat_model, read_json, refused, says};

/// What `pmetal infer` says about the chat model with other bytes in one of its files.
fn asking(name: &str, contents: &[u8]) -> String {
    let space = Space::new();
    let copy = space.copy(&chat_model(), "model");
    space.write(&format!("model/{name}"), contents);
    let message = refused(1, ["infer", "--model", &copy, "--prompt", "x", "--chat"]);
    says(&message, &[&format!("model/{name}")]);
    message
}

fn changed(change: &dyn Fn(&mut Value)) -> String {
    let mut tokenizer = read_json(format!("{}/tokenizer.json", chat_model()));
    change(&mut tokenizer);
    asking("tokenizer.json", tokenizer.to_string().as_bytes())
}

#[test]
fn tokenizers_that_cannot_be_built() {
    let again = "fetch the model's own file again";
    for contents in [b"".as_slice(), b"{", b"[]", b"null", b"\xff\xfe\0\x01", &b"[".repeat(100_000)] {
        says(&asking("tokenizer.json", contents), &["tokenizer.json: "]);
    }
    says(&asking("tokenizer.json", b"<html>404"), &["a web page", "fetch it again"]);
    says(&asking("tokenizer.json", b"version https://git-lfs"), &["git lfs pull"]);
    says(&changed(&|t| drop(t.as_object_mut().unwrap().remove("model"))), &["Model missing", again]);
    says(&changed(&|t| t["model"]["type"] = json!("Mystery")), &[again]);
    says(&changed(&|t| t["model"]["vocab"] = json!({})), &["vocabulary", again]);
    says(&changed(&|t| t["model"]["vocab"] = json!([1])), &["expected a map", again]);
    says(&changed(&|t| t["model"]["vocab"]["a"] = json!(-1)), &["expected u32", again]);
    says(&changed(&|t| t["model"]["merges"] = json!([["zz", "qq"]])), &["vocabulary", again]);
    says(&changed(&|t| t["model"]["merges"] = json!(["lonely"])), &[again]);
    says(&changed(&|t| t["pre_tokenizer"] = json!({"type": "Mystery"})), &[again]);
    let regex = json!({"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": false});
    says(&changed(&|t| t["pre_tokenizer"] = regex.clone()), &["parenthesis", again]);
    says(&changed(&|t| t["version"] = json!("9.0")), &["version '9.0'", again]);
    for charsmap in ["AAAA", "////////", ""] {
        let table = json!({"type": "Precompiled", "precompiled_charsmap": charsmap});
        says(&changed(&|t| t["normalizer"] = table.clone()), &["normalizer Precompiled", again]);
        let inside = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, table]});
        says(&changed(&|t| t["normalizer"] = inside.clone()), &["normalizer Precompiled", again]);
    }
}

#[test]
fn a_tokenizer_of_another_model() {
    let space = Space::new();
    let copy = space.edited(&chat_model(), "gaps", "tokenizer.json", |tokenizer| {
        for id in tokenizer["model"]["vocab"].as_object_mut().unwrap().values_mut() {
            *id = json!(3 * id.as_u64().unwrap());
        }
    });
    let message = refused(1, ["infer", "--model", &copy, "--prompt", "Where is the order from Berlin? 12345"]);
    says(&message, &["the model knows 0 to", "is the tokenizer of another model?"]);
    fs::remove_file(space.path("gaps/tokenizer.json")).unwrap();
    let message = refused(1, ["infer", "--model", &copy, "--prompt", "x"]);
    says(&message, &["gaps has no tokenizer", "tokenizer.json"]);
    fs::create_dir(space.path("gaps/tokenizer.json")).unwrap();
    let message = refused(1, ["infer", "--model", &copy, "--prompt", "x"]);
    says(&message, &["gaps/tokenizer.json", "it is a folder: name a file"]);
}

#[test]
fn the_files_beside_it() {
    for contents in [b"{".as_slice(), b"\xff\xfe{\0}\0"] {
        says(&asking("tokenizer_config.json", contents), &["bad JSON", "fetch the model's own file again"]);
    }
    says(&asking("tokenizer_config.json", b"{\"chat_template\": \"{% for\"}"), &["line 1: syntax error"]);
    says(&asking("chat_template.jinja", b"{{ messages | mystery }}"), &["line 1: unknown filter"]);
    says(&asking("chat_template.jinja", b"\xff\xfe{{"), &["valid UTF-8"]);
    for (key, value) in [("eos_token_id", json!("x")), ("temperature", json!("hot")), ("do_sample", json!(1))] {
        let message = asking("generation_config.json", json!({key: value}).to_string().as_bytes());
        says(&message, &[&format!("generation_config.json: {key}: expected"), "restore the model's own file"]);
    }
}

#[test]
fn templates_that_run_away() {
    let long = |link: &str| format!("{{{{ x{} }}}}", link.repeat(100_000));
    let cases: &[(&str, &str)] = &[
        ("{{ 'x' * 100000000000 }}", ""),
        ("{{ 'x' * 1000000000 }}", ""),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}", ""),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ range(10000000000) | list }}", ""),
        ("{% include '/etc/passwd' %}", "unknown statement include"),
        (&long("[0]"), "split it with {% set %}"),
        (&long(" + 1"), "split it with {% set %}"),
        (&format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(100_000)), "split it with {% set %}"),
        (&"{{ (".repeat(100_000), ""),
        (&"{% if x %}".repeat(100_000), ""),
    ];
    let space = Space::new();
    for (template, part) in cases {
        let file = space.write("t.jinja", template);
        let asked = ["infer", "--model", &chat_model(), "--prompt", "x", "--chat", "--chat-template", &file];
        says(&refused(1, asked), &["chat template", &file, "line 1", part]);
    }
}
