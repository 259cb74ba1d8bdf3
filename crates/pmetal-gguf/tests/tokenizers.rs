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
            // SentencePiece's visible space is a space when decoded, and a space is put or dropped behind special tokens.
            let pieces =
                (name.starts_with("llama") && name != "llama-bpe") || ["phi-3", "gemma4"].contains(&name.as_str());
            if pieces && (text.contains('▁') || text.contains('<')) {
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

/// Qwen's own tokenizer composes e and an accent to é; llama.cpp does not.
#[test]
fn characters_are_not_composed() {
    let tokenizer = open("qwen2").tokenizer().unwrap();
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert_ne!(ids("cafe\u{301}"), ids("café"));
    assert_eq!(tokenizer.decode(&ids("cafe\u{301}"), false).unwrap(), "cafe\u{301}");
}

/// One vocabulary under the name of every other pre-tokenizer.
#[test]
fn every_pre_tokenizer_cuts_as_llama_cpp_does() {
    let bytes = std::fs::read(Path::new(FIXTURES).join("tokenizer-gpt-2.gguf")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("renamed.gguf");
    for (name, rows) in json("pre-tokenizer-ids.json").as_object().unwrap() {
        std::fs::write(&path, with_pre_tokenizer(&bytes, name)).unwrap();
        let tokenizer = GgufFile::open(&path).unwrap().tokenizer().unwrap();
        for row in rows.as_array().unwrap() {
            let wanted: Vec<u32> = serde_json::from_value(row[1].clone()).unwrap();
            let found = tokenizer.encode(row[0].as_str().unwrap(), false).unwrap();
            assert_eq!(found.get_ids(), wanted, "{name}: {}: {:?}", row[0], found.get_tokens());
        }
    }
}

/// The file with another value under `tokenizer.ggml.pre`: a length of eight bytes, then the text.
fn with_pre_tokenizer(bytes: &[u8], name: &str) -> Vec<u8> {
    let key = b"tokenizer.ggml.pre";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    let length = (name.len() as u64).to_le_bytes();
    [&bytes[..at], &length, name.as_bytes(), &bytes[at + 8 + "gpt-2".len()..]].concat()
}

/// What `transformers` reads from a written `tokenizer.json` is what encodes here: nothing is lost in writing it.
#[test]
fn written_tokenizers_read_back_the_same() {
    for (name, rows) in json("tokenizer-ids.json").as_object().unwrap() {
        let written = open(name).tokenizer().unwrap().to_string(false).unwrap();
        compare(name, &written.parse().unwrap(), rows);
    }
}

#[test]
#[ignore = "needs the file scripts/fetch-smollm2.sh fetches, in PMETAL_SMOLLM2"]
fn smollm2_ids_are_those_of_llama_cpp() {
    let file = GgufFile::open(std::env::var("PMETAL_SMOLLM2").unwrap()).unwrap();
    compare("SmolLM2", &file.tokenizer().unwrap(), &json("smollm2-ids.json"));
    assert!(file.chat_template().unwrap().unwrap().contains("<|im_start|>"));
}

/// `scripts/check-vocabularies.sh` runs this: public models' vocabularies and what llama.cpp makes of many texts with them.
#[test]
#[ignore = "needs a folder of vocabularies with llama.cpp's ids, in PMETAL_LLAMA_VOCABS"]
fn public_vocabularies_give_the_ids_of_llama_cpp() {
    let folder = std::path::PathBuf::from(std::env::var("PMETAL_LLAMA_VOCABS").unwrap());
    let mut compared = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.display().to_string();
        let Some(model) = name.strip_suffix(".json") else { continue };
        let file = GgufFile::open(model).unwrap();
        let wanted: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut ends: Vec<_> = file.special_tokens().unwrap().end_of_generation.iter().map(|token| token.id).collect();
        ends.sort_unstable();
        assert_eq!(ends, serde_json::from_value::<Vec<u32>>(wanted["ends"].clone()).unwrap(), "{model}");
        compare(model, &file.tokenizer().unwrap(), &wanted["rows"]);
        println!("{model}: the same ids");
        compared += 1;
    }
    assert!(compared > 0, "{} has no GGUF file with ids beside it", folder.display());
}
