//! Folders and files of tokenizers; ids against those `transformers` gives (`scripts/make-tokenizer-fixtures.py`).

use std::path::Path;
use std::{fs, iter};

use pmetal_data::{Conversation, Message, Template, TemplateChoice, Tokenizer};
use serde_json::Value;
use tempfile::TempDir;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizers");
const GGUF_FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../pmetal-gguf/tests/fixtures");

/// `BASE+CHANGE`: the `tokenizer.json` of BASE with the other files of CHANGE.
fn folder_of(name: &str) -> TempDir {
    let (base, change) = name.split_once('+').unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(Path::new(FIXTURES).join(format!("{base}.json")), folder.path().join("tokenizer.json")).unwrap();
    for (file, content) in json("changes.json")[change].as_object().unwrap() {
        fs::write(folder.path().join(file), content.to_string()).unwrap();
    }
    folder
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(Path::new(FIXTURES).join(name)).unwrap()).unwrap()
}

fn compare(name: &str, tokenizer: &Tokenizer, rows: &Value) {
    for row in rows.as_array().unwrap() {
        let text = row[0].as_str().unwrap();
        for (ids, add_special) in [(&row[1], true), (&row[2], false)] {
            let wanted: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
            assert_eq!(tokenizer.encode(text, add_special).unwrap(), wanted, "{name}: {text:?}, {add_special}");
        }
    }
}

#[test]
fn folders_give_the_ids_of_transformers() {
    for (name, rows) in json("ids.json").as_object().unwrap() {
        let tokenizer = Tokenizer::from_model_path(folder_of(name).path()).unwrap();
        compare(name, &tokenizer, rows);
        let saved = tempfile::tempdir().unwrap();
        tokenizer.save(saved.path()).unwrap();
        compare(name, &Tokenizer::from_model_path(saved.path()).unwrap(), rows);
    }
}

/// Ids in any order, streamed, give what they give at once; what comes is never taken back and nothing waits for long.
#[test]
fn streams_give_what_decoding_at_once_gives() {
    for name in ["gpt-2", "llama", "llama-no-prefix", "gemma4", "phi-3"] {
        let path = Path::new(GGUF_FIXTURES).join(format!("tokenizer-{name}.gguf"));
        let tokenizer = Tokenizer::from_model_path(path).unwrap();
        let mut state = 11_u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..400 {
            // Among the first ids are those of single bytes: long runs of them, and stray ones.
            let below = if draw(2) == 0 { 262 } else { tokenizer.vocab_size() as u64 };
            let ids: Vec<u32> = iter::repeat_with(|| draw(below) as u32).take(24).collect();
            let mut stream = tokenizer.stream();
            let mut text = String::new();
            for (count, &id) in (1..).zip(&ids) {
                text += &stream.push(id).unwrap();
                let so_far = tokenizer.decode(&ids[..count]).unwrap();
                let waiting = so_far.strip_prefix(&text).unwrap_or_else(|| panic!("{name}: {text:?}, {so_far:?}"));
                assert!(waiting.is_empty() || waiting == "\u{fffd}", "{name}: {waiting:?} waits in {so_far:?}");
            }
            text += &stream.finish().unwrap();
            assert_eq!(text, tokenizer.decode(&ids).unwrap(), "{name}: {ids:?}");
        }
    }
}

#[test]
fn named_templates_are_kept_and_chosen() {
    let folder = folder_of("bytes+templates");
    let tokenizer = Tokenizer::from_model_path(folder.path()).unwrap();
    let asked = |tokenizer: &Tokenizer, tools: Option<serde_json::Value>| {
        let template = Template::choose(&TemplateChoice::Auto, tokenizer).unwrap();
        template.render_prompt(&Conversation { messages: vec![Message::new("user", "Hi")], tools }).unwrap()
    };
    let tools = Some(serde_json::json!([{"type": "function"}]));
    assert_eq!(asked(&tokenizer, tools.clone()), "with tools");
    assert_eq!(asked(&tokenizer, None), "without");
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    assert_eq!(fs::read_to_string(saved.path().join("chat_template.jinja")).unwrap(), "without");
    let more = saved.path().join("additional_chat_templates");
    assert_eq!(fs::read_to_string(more.join("tool_use.jinja")).unwrap(), "with tools");
    assert_eq!(fs::read_to_string(more.join("rag.jinja")).unwrap(), "documents");
    let again = Tokenizer::from_model_path(saved.path()).unwrap();
    assert_eq!(asked(&again, tools), "with tools");
    // A name becomes a file's name, so it cannot lead elsewhere.
    let config = r#"{"chat_template": [{"name": "../../x", "template": "y"}]}"#;
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let message = Tokenizer::from_model_path(folder.path()).unwrap_err().to_string();
    assert!(message.contains("tokenizer_config.json") && message.contains("\"../../x\""), "{message}");
}

/// The library panics on these.
#[test]
fn merges_that_make_no_token_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    for (merges, prefix) in [(r#"[["ab", "c"]]"#, "null"), (r#"["ab c"]"#, "null"), (r#"[["a", "b"]]"#, "\"###\"")] {
        let model = format!(
            r#"{{"type": "BPE", "vocab": {{"a": 0, "b": 1, "c": 2, "ab": 3}}, "merges": {merges}, "continuing_subword_prefix": {prefix}}}"#
        );
        fs::write(&path, format!(r#"{{"version": "1.0", "added_tokens": [], "model": {model}}}"#)).unwrap();
        let message = Tokenizer::from_model_path(folder.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json") && message.contains("makes no token"), "{message}");
    }
}
