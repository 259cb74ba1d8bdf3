//! GGUF files, broken one way at a time.

use crate::{
    common::{Space, refused, says, succeed, told},
    gguf_bytes::{
        Gguf, Tensor,
        Value::{self, F32, Text, Texts, U32, U32s},
    },
};

fn opening(file: &[u8]) -> String {
    let space = Space::new();
    let path = space.write("model.gguf", file);
    let message = told(&space, &path);
    says(&message, &[&path]);
    message
}

/// What `pmetal infer`, which needs the tokenizer, says.
fn asking(file: &Gguf) -> String {
    let space = Space::new();
    let path = space.write("model.gguf", file.bytes());
    let message = refused(1, ["infer", "--model", &path, "--prompt", "abc"]);
    says(&message, &[&path]);
    message
}

#[test]
fn the_file_that_the_others_are_made_from_is_good() {
    let space = Space::new();
    let path = space.write("model.gguf", Gguf::llama().bytes());
    succeed(["infer", "--model", &path, "--prompt", "abc", "--max-tokens", "1"]);
}

#[test]
fn headers_of_other_kinds() {
    let good = Gguf::llama().bytes();
    let with = |at: usize, bytes: &[u8]| [&good[..at], bytes, &good[at + bytes.len()..]].concat();
    let huge = (1_u64 << 40).to_le_bytes();
    let cases: &[(Vec<u8>, &[&str])] = &[
        (with(0, b"GGML"), &["is not a GGUF file", "expected 'GGUF'", "download it again"]),
        (with(4, &1_u32.to_le_bytes()), &["GGUF version 1 is not known", "convert the model again"]),
        (with(4, &3_u32.to_be_bytes()), &["little-endian", "convert the model again"]),
        (with(8, &huge), &["download"]),
        (with(16, &huge), &["truncated", "of 1099511627776", "download it again"]),
        (with(24, &huge), &["truncated: metadata key 1", "download it again"]),
        (b"<!DOCTYPE html>".to_vec(), &["is a web page", "fetch it again"]),
        (b"version https://git-lfs.github.com/spec/v1".to_vec(), &["a Git LFS pointer", "git lfs pull"]),
        (b"PK\x03\x04".to_vec(), &["a zip archive"]),
    ];
    for (file, parts) in cases {
        says(&opening(file), parts);
    }
}

#[test]
fn metadata_that_describe_no_model() {
    for key in [
        "general.architecture",
        "llama.context_length",
        "llama.embedding_length",
        "llama.block_count",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let message = opening(&Gguf::llama().without(key).bytes());
        says(&message, &[&format!("metadata key '{key}' is missing"), "download or convert it again"]);
    }
    let cases: &[(&str, Value, &[&str])] = &[
        ("general.architecture", Text("bert"), &["architecture 'bert' is not known", "`pmetal models`"]),
        ("general.architecture", U32(5), &["'general.architecture': expected a string, found 5"]),
        ("general.alignment", U32(7), &["'general.alignment': expected a multiple of 8, found 7", "convert it again"]),
        ("general.alignment", U32(0), &["'general.alignment'"]),
        ("general.alignment", Text("32"), &["'general.alignment': expected a whole number"]),
        ("llama.context_length", Text("x"), &["'llama.context_length': expected a whole number, found 'x'"]),
        ("llama.context_length", U32(0), &["'llama.context_length': expected at least 1"]),
        ("llama.attention.head_count", U32(0), &["'llama.attention.head_count': expected at least 1"]),
        ("llama.attention.head_count_kv", U32s(vec![1, 1]), &["found an array of 2"]),
        ("llama.attention.layer_norm_rms_epsilon", F32(f32::NAN), &["rms_epsilon': expected a finite number"]),
        ("llama.attention.layer_norm_rms_epsilon", Text("small"), &["rms_epsilon': expected a finite number"]),
        ("llama.block_count", U32(2), &["tensor 'blk.1.attn_norm.weight' is missing", "convert it again"]),
        ("llama.block_count", U32(u32::MAX), &["is missing"]),
        ("llama.embedding_length", U32(16), &["[", "expected"]),
        ("llama.expert_count", U32(8), &["metadata key 'llama.expert_used_count' is missing"]),
        ("llama.rope.scaling.type", Text("weird"), &["rope scaling 'weird' is not known"]),
        ("llama.rope.freq_base", F32(-1.0), &["rope_theta"]),
        ("llama.rope.dimension_count", U32(2), &["'llama.rope.dimension_count' = 2", "not supported"]),
        ("split.count", U32(3), &["one part of a model in 3 files", "llama-gguf-split --merge"]),
    ];
    for (key, value, parts) in cases {
        says(&opening(&Gguf::llama().set(key, value.clone()).bytes()), parts);
    }
}

#[test]
fn tensors_that_do_not_fit() {
    let norm = "output_norm.weight";
    let with = |tensor: Tensor| opening(&Gguf::llama().tensor(norm, tensor).bytes());
    says(&opening(&Gguf::llama().without(norm).bytes()), &["model.norm.weight is missing", "fetch both again"]);
    says(&opening(&Gguf::llama().without("token_embd.weight").bytes()), &["'token_embd.weight' is missing"]);
    says(&with(Tensor::zeros(&[4])), &["model.norm.weight is [4], expected [8]"]);
    says(
        &with(Tensor { kind: 99, ..Tensor::zeros(&[8]) }),
        &["block type 99, which is not known", "take a file in one"],
    );
    says(&with(Tensor { kind: 2, ..Tensor::zeros(&[8]) }), &["whole Q4_0 blocks of 32 numbers", "convert it again"]);
    says(&with(Tensor { shape: vec![1 << 40], ..Tensor::zeros(&[8]) }), &["truncated: tensor 'output_norm.weight'"]);
    says(&with(Tensor { shape: vec![0], ..Tensor::zeros(&[8]) }), &["tensor 'output_norm.weight'"]);
    says(&with(Tensor { shape: vec![1; 5], ..Tensor::zeros(&[8]) }), &["1 to 4 dimensions, found 5"]);
    let extra = Gguf::llama().tensor("blk.0.mystery.weight", Tensor::zeros(&[8]));
    says(&opening(&extra.bytes()), &["'blk.0.mystery.weight'", "not supported"]);
    let mut twice = Gguf::llama();
    twice.tensors.push((norm, Tensor::zeros(&[8])));
    says(&opening(&twice.bytes()), &["tensor 'output_norm.weight': expected one of that name, found two"]);
    let mut twice = Gguf::llama();
    twice.pairs.push(("general.architecture", Text("llama")));
    says(&opening(&twice.bytes()), &["'general.architecture': expected one value, found two"]);
}

#[test]
fn tokenizers_in_the_metadata() {
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.merges"] {
        says(&asking(&Gguf::llama().without(key)), &[&format!("metadata key '{key}' is missing"), "convert it again"]);
    }
    says(&asking(&Gguf::llama().without("tokenizer.ggml.tokens")), &["has no tokenizer"]);
    let cases: &[(&str, Value, &[&str])] = &[
        ("tokenizer.ggml.model", Text("bert"), &["tokenizer model 'bert'", "tokenizer.json beside it"]),
        ("tokenizer.ggml.pre", Text("nope"), &["pre-tokenizer 'nope' is not known", "tokenizer.json beside it"]),
        ("tokenizer.ggml.merges", Texts(vec!["zz yy"]), &["merges'", "found 'zz yy'", "convert it again"]),
        ("tokenizer.ggml.merges", Texts(vec!["ab"]), &["expected two tokens and a space, found 'ab'"]),
        ("tokenizer.ggml.tokens", U32s(vec![1, 2]), &["expected an array of strings, found an array of 2"]),
        ("tokenizer.ggml.tokens", Texts(vec!["a"]), &["convert it again"]),
        ("tokenizer.ggml.model", Text("llama"), &["'tokenizer.ggml.scores' is missing"]),
        ("tokenizer.ggml.eos_token_id", Text("x"), &["eos_token_id': expected a whole number, found 'x'"]),
        ("tokenizer.ggml.add_bos_token", U32(1), &["add_bos_token': expected true or false, found 1"]),
        ("tokenizer.ggml.token_type", Texts(vec!["a"]), &["token_type': expected an array of numbers"]),
    ];
    for (key, value, parts) in cases {
        says(&asking(&Gguf::llama().set(key, value.clone())), parts);
    }
}
