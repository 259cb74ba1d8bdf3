//! Truncated, damaged and hostile files: always a typed error that names what is wrong, never a panic or a huge allocation.

use std::path::Path;

use candle_core::DType;
use pmetal_gguf::{Error, GgufFile};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(FIXTURES).join(name)).unwrap()
}

/// Opens a file of these bytes.
fn open(bytes: &[u8]) -> Result<GgufFile, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path)
}

fn open_error(bytes: &[u8]) -> String {
    open(bytes).unwrap_err().to_string()
}

/// Everything a file can be asked; the answers may be errors.
fn ask_everything(file: &GgufFile) {
    let _ = file.hf_config();
    let _ = file.tokenizer().map(|tokenizer| tokenizer.encode("Hello <|im_end|> 123", true).map(drop));
    let _ = file.chat_template();
    for tensor in file.tensors() {
        let _ = file.dequantize(&tensor.name, DType::F32);
    }
    for (name, _) in file.hf_tensors().unwrap_or_default() {
        let _ = file.hf_tensor(&name, DType::BF16);
        let _ = file.hf_slice(&name, 1, DType::BF16);
    }
}

/// The bytes with the one occurrence of `from` replaced.
fn patched(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at: Vec<_> = (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from)).collect();
    assert_eq!(at.len(), 1, "{from:?} occurs {} times", at.len());
    [&bytes[..at[0]], to, &bytes[at[0] + from.len()..]].concat()
}

/// A GGUF string: its length, then its bytes.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A file with this header after magic and version, filled up to whole kilobytes of data.
fn with_header(tensors: u64, pairs: u64, rest: &[&[u8]]) -> Vec<u8> {
    let counts = [tensors.to_le_bytes(), pairs.to_le_bytes()].concat();
    let mut file = [b"GGUF", &3_u32.to_le_bytes()[..], &counts, &rest.concat()].concat();
    file.resize(file.len().next_multiple_of(1024) + 1024, 0);
    file
}

/// A tensor's entry: name, dimensions innermost first, block type, offset.
fn tensor(name: &str, dimensions: &[u64], block_type: u32, offset: u64) -> Vec<u8> {
    let mut entry = [string(name), (dimensions.len() as u32).to_le_bytes().to_vec()].concat();
    entry.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
    entry.extend(block_type.to_le_bytes());
    entry.extend(offset.to_le_bytes());
    entry
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = fixture("llama.gguf");
    let header = 2048;
    let cuts = (0..header).chain((header..bytes.len()).step_by(997)).chain([bytes.len() - 1]);
    for cut in cuts {
        match open(&bytes[..cut]) {
            Err(Error::Truncated { expected, found, .. }) => assert!(expected > found, "{cut}"),
            Err(other) => panic!("{cut}: {other}"),
            Ok(_) => panic!("{cut} bytes of {} were enough", bytes.len()),
        }
    }
    open(&bytes).unwrap();
}

#[test]
fn a_truncation_names_what_is_cut() {
    let bytes = fixture("llama.gguf");
    assert!(open_error(&bytes[..2]).contains("the magic number needs 4 bytes from offset 0, found 2"));
    assert!(open_error(&bytes[..60]).contains("truncated: metadata key"), "{}", open_error(&bytes[..60]));
    let error = open_error(&bytes[..bytes.len() - 1]);
    assert!(error.contains("model.gguf is truncated: tensor '") && error.contains("found"), "{error}");
    assert!(open_error(b"").contains("truncated"));
    assert!(open_error(b"PK\x03\x04 not a model").contains("is not a GGUF file"));
    let missing = GgufFile::open("no/such/file.gguf").unwrap_err().to_string();
    assert!(missing.contains("no/such/file.gguf"), "{missing}");
}

#[test]
fn flipped_bits_never_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    // The headers: data may hold any bytes.
    for (name, header) in [
        ("llama.gguf", 1900),
        ("blocks.gguf", 900),
        ("tokenizer-llama-bpe.gguf", 16_500),
        ("tokenizer-llama.gguf", 18_800),
        ("deepseek-v32.gguf", 4700),
        ("gpt-oss-mxfp4-hub.gguf", 3600),
        ("phi3-longrope-partial-hub.gguf", 1700),
        ("gemma2.gguf", 2800),
    ] {
        let bytes = fixture(name);
        for _ in 0..300 {
            let mut damaged = bytes.clone();
            for _ in 0..1 + random(3) {
                let at = random(header);
                damaged[at] ^= 1 << random(8);
            }
            if let Ok(file) = open(&damaged) {
                ask_everything(&file);
            }
        }
    }
}

#[test]
fn lengths_are_never_trusted() {
    let key = string("k");
    let of = |parts: &[&[u8]]| [&[key.as_slice()], parts].concat().concat();
    let [string_type, array_type, u8_type, u32_type] = [8_u32, 9, 0, 4].map(u32::to_le_bytes);
    let [huge, most] = [u64::MAX, u64::MAX / 4].map(u64::to_le_bytes);
    for value in [
        of(&[&string_type, &huge]),
        of(&[&array_type, &u8_type, &huge]),
        of(&[&array_type, &u32_type, &most]),
        of(&[&array_type, &string_type, &most]),
    ] {
        assert!(open_error(&with_header(0, 1, &[&value])).contains("truncated: metadata key 'k'"));
    }
    assert!(open_error(&with_header(0, 1, &[&huge])).contains("metadata key 1 of 1"));
    assert!(matches!(
        open(&with_header(u64::MAX, u64::MAX, &[])),
        Err(Error::Malformed { .. } | Error::Truncated { .. })
    ));
    let nested = of(&[&array_type, &array_type, &1_u64.to_le_bytes()]);
    assert!(open_error(&with_header(0, 1, &[&nested])).contains("found an array of arrays"));
    let twice = of(&[&u8_type, &[1]]);
    assert!(open_error(&with_header(0, 2, &[&twice, &twice])).contains("metadata key 'k': expected one value"));
}

#[test]
fn impossible_tensors_are_named() {
    let error = |entries: &[Vec<u8>]| {
        let entries: Vec<&[u8]> = entries.iter().map(Vec::as_slice).collect();
        open_error(&with_header(entries.len() as u64, 0, &entries))
    };
    let unknown = error(&[tensor("w", &[32], 16, 0)]);
    assert!(unknown.contains("tensor 'w' has block type 16, which is not known; known are F32, F16,"), "{unknown}");
    assert!(error(&[tensor("w", &[33], 2, 0)]).contains("rows of whole Q4_0 blocks of 32 numbers, found shape [33]"));
    assert!(error(&[tensor("w", &[1 << 40, 1 << 40], 0, 0)]).contains("tensor 'w'"));
    assert!(error(&[tensor("w", &[!255, 1 << 20], 12, 0)]).contains("tensor 'w'"));
    assert!(error(&[tensor("w", &[0], 0, 0)]).contains("found shape [0]"));
    assert!(error(&[tensor("w", &[1; 5], 0, 0)]).contains("1 to 4 dimensions, found 5"));
    assert!(error(&[tensor("w", &[1 << 20], 0, 0)]).contains("needs 4194304 bytes"));
    assert!(error(&[tensor("w", &[1], 0, u64::MAX - 31)]).contains("tensor 'w'"));
    assert!(error(&[tensor("w", &[1], 0, 4)]).contains("an offset that is a multiple of 32, found 4"));
    assert!(
        error(&[tensor("w", &[1], 0, 0), tensor("w", &[1], 0, 0)]).contains("tensor 'w': expected one of that name")
    );
}

#[test]
fn unknown_kinds_are_named_with_those_known() {
    let bytes = fixture("llama.gguf");
    let file = open(&patched(&bytes, &string("llama"), &string("mamba"))).unwrap();
    let error = file.hf_config().unwrap_err().to_string();
    assert!(error.contains("architecture 'mamba' is not known; known are llama, mistral3, llama4, qwen2, "), "{error}");

    let bytes = fixture("tokenizer-qwen2.gguf");
    let file = open(&patched(&bytes, &string("qwen2"), &string("qwen9"))).unwrap();
    let error = file.tokenizer().unwrap_err().to_string();
    assert!(error.contains("pre-tokenizer 'qwen9' is not known; known are gpt-2, "), "{error}");
    let file = open(&patched(&bytes, &string("gpt2"), &string("bert"))).unwrap();
    let error = file.tokenizer().unwrap_err().to_string();
    assert!(error.contains("tokenizer model 'bert' is not known; known are gpt2, llama, gemma4"), "{error}");

    let version = open_error(&patched(&bytes, b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0"));
    assert!(version.contains("GGUF version 1 is not known"), "{version}");
    let error = open(&fixture("llama.gguf")).unwrap().tokenizer().unwrap_err().to_string();
    assert!(error.contains("metadata key 'tokenizer.ggml.tokens' is missing; download"), "{error}");
}

#[test]
fn what_a_family_has_no_place_for_is_named() {
    let bytes = fixture("deepseek-v3.gguf");
    let foreign = open(&patched(&bytes, b"blk.1.ffn_down_shexp", b"blk.1.ffn_some_shexp")).unwrap();
    let error = foreign.hf_tensors().unwrap_err().to_string();
    assert!(error.contains("tensor 'blk.1.ffn_some_shexp.weight' in architecture 'deepseek2'"), "{error}");
    let half = open(&patched(&bytes, b"blk.1.attn_k_b", b"blk.1.attn_x_b")).unwrap();
    assert!(half.hf_tensors().unwrap_err().to_string().contains("'blk.1.attn_"));
    let [sigmoid, softmax] = [2_u32, 1].map(|function| {
        [string("deepseek2.expert_gating_func"), 4_u32.to_le_bytes().to_vec(), function.to_le_bytes().to_vec()].concat()
    });
    let error = open(&patched(&bytes, &sigmoid, &softmax)).unwrap().hf_config().unwrap_err().to_string();
    assert!(error.contains("routing by a softmax"), "{error}");
    let dense = open(&patched(&fixture("granite-tied-hub.gguf"), &string("granite"), &string("qwen2xx"))).unwrap();
    assert!(dense.hf_config().unwrap_err().to_string().contains("architecture 'qwen2xx' is not known"));
}

/// The vocabulary of three tokens, its merges, scores and types, as a file with these and no tensors.
fn vocabulary(model: &str, tokens: &[&str], merges: &[&str], scores: &[f32], types: &[i32]) -> Result<GgufFile, Error> {
    let texts = |key: &str, texts: &[&str]| {
        let head = [string(key), 9_u32.to_le_bytes().to_vec(), 8_u32.to_le_bytes().to_vec()].concat();
        let list: Vec<u8> = texts.iter().flat_map(|text| string(text)).collect();
        [head, (texts.len() as u64).to_le_bytes().to_vec(), list].concat()
    };
    let numbers = |key: &str, kind: u32, count: usize, list: Vec<u8>| {
        let head = [string(key), 9_u32.to_le_bytes().to_vec(), kind.to_le_bytes().to_vec()].concat();
        [head, (count as u64).to_le_bytes().to_vec(), list].concat()
    };
    let text = |key: &str, value: &str| [string(key), 8_u32.to_le_bytes().to_vec(), string(value)].concat();
    let pairs = [
        text("general.architecture", "llama"),
        text("tokenizer.ggml.model", model),
        text("tokenizer.ggml.pre", "gpt-2"),
        texts("tokenizer.ggml.tokens", tokens),
        texts("tokenizer.ggml.merges", merges),
        numbers(
            "tokenizer.ggml.scores",
            6,
            scores.len(),
            scores.iter().flat_map(|score| score.to_le_bytes()).collect(),
        ),
        numbers(
            "tokenizer.ggml.token_type",
            5,
            types.len(),
            types.iter().flat_map(|kind| kind.to_le_bytes()).collect(),
        ),
    ];
    let parts: Vec<&[u8]> = pairs.iter().map(Vec::as_slice).collect();
    open(&with_header(0, parts.len() as u64, &parts))
}

fn tokenizer_error(model: &str, tokens: &[&str], merges: &[&str], scores: &[f32], types: &[i32]) -> String {
    vocabulary(model, tokens, merges, scores, types).unwrap().tokenizer().unwrap_err().to_string()
}

#[test]
fn contradicting_vocabularies_are_errors() {
    let three = [0.0; 3];
    let message = tokenizer_error("gpt2", &["a", "b", "a"], &[], &three, &[1; 3]);
    assert!(
        message.contains("tokenizer.ggml.tokens': expected each token once, found \"a\" as 0 and as 2"),
        "{message}"
    );
    let message = tokenizer_error("llama", &["a", "b", "c"], &[], &[0.0; 2], &[1; 3]);
    assert!(message.contains("tokenizer.ggml.scores': expected 3 numbers, one per token, found 2"), "{message}");
    let message = tokenizer_error("gpt2", &["a", "b", "c"], &[], &three, &[1; 2]);
    assert!(message.contains("tokenizer.ggml.token_type': expected 3 numbers, one per token, found 2"), "{message}");
    let message = tokenizer_error("gpt2", &["a", "b", "c"], &["ab"], &three, &[1; 3]);
    assert!(message.contains("tokenizer.ggml.merges': expected two tokens and a space, found 'ab'"), "{message}");
    for unknown in ["a z", "a b"] {
        let message = tokenizer_error("gpt2", &["a", "b", "c"], &[unknown], &three, &[1; 3]);
        let expected = format!("tokenizer.ggml.merges': expected tokens that make a token, found '{unknown}'");
        assert!(message.contains(&expected), "{message}");
    }
    let message = tokenizer_error("bert", &["a", "b", "c"], &[], &three, &[1; 3]);
    assert!(message.contains("tokenizer model") && message.contains("gpt2, llama, gemma4"), "{message}");
}

#[test]
fn odd_vocabularies_are_read_as_llama_cpp_reads_them() {
    // An empty token has a name instead; scores that are no numbers; types nobody knows; a merge that is there twice.
    let scores = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let file = vocabulary("llama", &["<unk>", "", "b"], &[], &scores, &[-7, 99, i32::MIN]).unwrap();
    assert_eq!(file.tokenizer().unwrap().encode("b[EMPTY_1]", false).unwrap().get_ids().first(), Some(&0));
    let file = vocabulary("gpt2", &["a", "b", "ab", "ba"], &["b a", "a b", "b a"], &[0.0; 4], &[1; 4]).unwrap();
    assert_eq!(file.tokenizer().unwrap().encode("aba", false).unwrap().get_ids(), [0, 3]);
}
