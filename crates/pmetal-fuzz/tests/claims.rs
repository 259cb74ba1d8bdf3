//! Files that claim more than they hold, or nest deeper than a stack: refused before anything is allocated for the claim.

use std::sync::{Mutex, PoisonError};

use pmetal_fuzz::{adapter, config, gguf, jsonl, safetensors, template, tokenizer};
use pmetal_ops::memory::{PoolAllocator, live_bytes, peak_bytes, reset_peak};

/// Counts what lives: one test at a time (`ALONE`), so that nothing else allocates meanwhile.
#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

static ALONE: Mutex<()> = Mutex::new(());

/// Memory beside what a file accounts for: read buffers, regular expressions, the good files around a bad one.
const FIXED: usize = 48 << 20;

/// Runs a target that must refuse the bytes, within `times` their length.
#[track_caller]
fn refuses(target: fn(&[u8]) -> bool, bytes: &[u8], times: usize) {
    let before = live_bytes();
    reset_peak();
    let taken = target(bytes);
    let peak = peak_bytes().saturating_sub(before);
    let beginning: String = String::from_utf8_lossy(bytes).chars().take(60).collect();
    assert!(!taken, "taken: {beginning}");
    assert!(peak <= FIXED + times * bytes.len(), "{peak} bytes of memory for the {} of {beginning}", bytes.len());
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A GGUF file of this header behind magic and version, and a kilobyte of zeros.
fn gguf_file(parts: &[&[u8]]) -> Vec<u8> {
    [b"GGUF", &3_u32.to_le_bytes()[..], &parts.concat(), &[0; 1024]].concat()
}

fn safetensors_file(header: &str) -> Vec<u8> {
    [&string(header)[..], &[0; 64]].concat()
}

fn nested(open: &str, close: &str) -> Vec<u8> {
    (open.repeat(100_000) + &close.repeat(100_000)).into_bytes()
}

#[test]
fn claims_are_not_believed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let [one, many] = [1_u64, 1 << 40].map(u64::to_le_bytes);
    let [string_type, array_type, u64_type, u32_type] = [8_u32, 9, 10, 4].map(u32::to_le_bytes);
    let key = string("tokenizer.ggml.tokens");
    for parts in [
        &[&many[..], &many][..],
        &[&many, &[0; 8]],
        &[&[0; 8], &many],
        &[&[0; 8], &one, &many],
        &[&[0; 8], &one, &key, &string_type, &many],
        &[&[0; 8], &one, &key, &array_type, &string_type, &many],
        &[&[0; 8], &one, &key, &array_type, &u64_type, &many],
        &[&[0; 8], &one, &key, &array_type, &array_type, &many],
        &[&one, &[0; 8], &many],
        &[&one, &[0; 8], &string("w"), &u32_type, &many, &many, &many, &many, &[0; 12]],
        &[&one, &[0; 8], &string("w"), &1_u32.to_le_bytes(), &many, &[0; 12]],
    ] {
        refuses(gguf, &gguf_file(parts), 2);
    }

    for length in [1_u64 << 60, u64::MAX, 99_999_999, 100_000_001] {
        let lies = [&length.to_le_bytes()[..], b"{}"].concat();
        refuses(safetensors, &lies, 2);
        refuses(adapter, &lies, 2);
    }
    for header in [
        r#"{"x":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,64]}}"#,
        r#"{"x":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[48,32]}}"#,
        r#"{"x":{"dtype":"F32","shape":[16],"data_offsets":[18446744073709551552,18446744073709551615]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"y":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#,
        r#"{"x":{"dtype":"F4","shape":[1,7],"data_offsets":[0,3]}}"#,
    ] {
        refuses(safetensors, &safetensors_file(header), 8);
        refuses(adapter, &safetensors_file(header), 8);
    }

    for (key, value) in [
        ("head_dim", "67108864"),
        ("num_hidden_layers", "4096"),
        ("vocab_size", "67108864"),
        ("max_position_embeddings", "67108864"),
        ("num_attention_heads", "67108864"),
    ] {
        let json = format!(
            r#"{{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "{key}": {value}}}"#
        );
        // that the description alone is sound is not the point: the weights beside it are far too few
        let before = live_bytes();
        reset_peak();
        config(json.as_bytes());
        let peak = peak_bytes().saturating_sub(before);
        assert!(peak <= FIXED, "{peak} bytes of memory for {key} = {value}");
    }
}

#[test]
fn depth_is_bounded() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for json in [nested("[", "]"), nested("{\"a\":", "}"), nested("[", "")] {
        for target in [jsonl, config, tokenizer, adapter, safetensors] {
            refuses(target, &json, 96);
        }
        let row = [b"{\"messages\": ", &json[..], b"}"].concat();
        refuses(jsonl, &row, 96);
        let header = safetensors_file(&String::from_utf8(json).unwrap());
        refuses(safetensors, &header, 96);
    }
    for source in [
        nested("{{ (", ") }}"),
        nested("{% if x %}", "{% endif %}"),
        [b"{{ ", &nested("[", "]")[..], b" }}"].concat(),
        [b"{{ ", &nested("(", ")")[..], b" }}"].concat(),
        [b"{{ ", &nested("not ", "")[..], b"x }}"].concat(),
        [b"{{ ", &nested("- ", "")[..], b"x }}"].concat(),
        [b"{{ x", &nested("[0]", "")[..], b" }}"].concat(),
        b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_vec(),
    ] {
        refuses(template, &source, 400);
    }
}

#[test]
fn long_rows_cost_what_they_hold() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let length = 8 << 20;
    let text = "word ".repeat(length / 5);
    // a row of ids without a label: read, kept nowhere
    let ids = format!("{{\"input_ids\": [1], \"labels\": [-100], \"note\": \"{text}\"}}\n");
    refuses(jsonl, ids.as_bytes(), 8);
    let open = format!("{{\"text\": \"{text}");
    refuses(jsonl, open.as_bytes(), 8);
    refuses(jsonl, &vec![b'['; length], 8);
    refuses(jsonl, &vec![0; length], 8);
}
