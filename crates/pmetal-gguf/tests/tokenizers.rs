//! Ids against llama.cpp's own, over scripts, digits, spaces and special tokens; see `scripts/make-gguf-fixtures.py`.

use std::path::Path;

use pmetal_gguf::GgufFile;
use serde_json::Value;
use tokenizers::Tokenizer;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(Path::new(FIXTURES).join(name)).unwrap()).unwrap()
}

fn open(name: &str) -> GgufFile {
    GgufFile::open(Path::new(FIXTURES).join(format!("tokenizer-{name}.gguf"))).unwrap()
}

fn compare(name: &str, tokenizer: &Tokenizer, rows: &Value) {
    for row in rows.as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        for (key, add_special) in [("ids", false), ("with_special", true)] {
            let wanted: Vec<u32> = serde_json::from_value(row[key].clone()).unwrap();
            let found = tokenizer.encode(text, add_special).unwrap();
            assert_eq!(found.get_ids(), wanted, "{name}: {text:?}: {:?}", found.get_tokens());
        }
    }
}

#[test]
fn ids_are_those_of_llama_cpp() {
    for (name, rows) in json("tokenizer-ids.json").as_object().unwrap() {
        compare(name, &open(name).tokenizer().unwrap(), rows);
    }
}

#[test]
fn decoding_gives_the_text_back() {
    for (name, rows) in json("tokenizer-ids.json").as_object().unwrap() {
        let tokenizer = open(name).tokenizer().unwrap();
        for row in rows.as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            // SentencePiece's visible space is a space when decoded, and a space is put behind every special token.
            if name.starts_with("llama") && name != "llama-bpe" && (text.contains('▁') || text.contains('<')) {
                continue;
            }
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text, "{name}");
        }
    }
}

#[test]
fn special_tokens_are_found() {
    let file = open("qwen2");
    let special = file.special_tokens().unwrap();
    assert_eq!(special.bos.unwrap().text, "<|im_start|>");
    assert_eq!(special.eos.as_ref().unwrap().text, "<|im_end|>");
    assert_eq!(special.pad.unwrap().id, 0);
    assert_eq!(special.unk, None);
    let ends: Vec<_> = special.end_of_generation.iter().map(|token| token.text.as_str()).collect();
    assert_eq!(ends, ["<|im_end|>", "<|endoftext|>"]);
    assert!(!special.add_bos && !special.add_eos);
    assert_eq!(file.chat_template().unwrap(), Some("{{ messages[0].content }}"));
    let tokenizer = file.tokenizer().unwrap();
    let ids = tokenizer.encode("<|im_start|>a<think>b</think><|im_end|>", false).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<think>b</think>");

    assert!(open("llama-bpe").special_tokens().unwrap().add_bos);
    let special = open("llama").special_tokens().unwrap();
    assert_eq!(special.bos.unwrap().text, "<s>");
    assert_eq!(special.unk.unwrap().text, "<unk>");
    assert!(special.add_bos && !special.add_eos);
    assert_eq!(open("llama").chat_template().unwrap(), None);
}

/// Qwen's tokenizer composes: e and a combining acute accent are é.
#[test]
fn qwen_composes_characters() {
    let tokenizer = open("qwen2").tokenizer().unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert_eq!(ids("cafe\u{301}"), ids("café"));
}

#[test]
#[ignore = "needs the file scripts/fetch-smollm2.sh fetches, in PMETAL_SMOLLM2"]
fn smollm2_ids_are_those_of_llama_cpp() {
    let file = GgufFile::open(std::env::var("PMETAL_SMOLLM2").unwrap()).unwrap();
    compare("SmolLM2", &file.tokenizer().unwrap(), &json("smollm2-ids.json"));
    assert!(file.chat_template().unwrap().unwrap().contains("<|im_start|>"));
}
