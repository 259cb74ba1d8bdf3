//! GGUF files put together byte by byte, so that a test can put them together wrongly.

/// A metadata value.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(&'static str),
    Texts(Vec<&'static str>),
    U32s(Vec<u32>),
}

use Value::{Bool, F32, Text, Texts, U32, U32s};

/// A tensor: shape, outermost dimension first, ggml's number of its block type, and its bytes.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

/// A file as its parts, to be changed before it is written.
#[derive(Clone)]
pub struct Gguf {
    pub pairs: Vec<(&'static str, Value)>,
    pub tensors: Vec<(&'static str, Tensor)>,
}

impl Gguf {
    /// A llama of one layer and 16 ids, with a byte-level tokenizer of 16 letters.
    pub fn llama() -> Self {
        let pairs = vec![
            ("general.architecture", Text("llama")),
            ("llama.context_length", U32(64)),
            ("llama.embedding_length", U32(8)),
            ("llama.block_count", U32(1)),
            ("llama.feed_forward_length", U32(12)),
            ("llama.attention.head_count", U32(2)),
            ("llama.attention.head_count_kv", U32(1)),
            ("llama.attention.layer_norm_rms_epsilon", F32(1e-5)),
            ("tokenizer.ggml.model", Text("gpt2")),
            ("tokenizer.ggml.pre", Text("llama-bpe")),
            ("tokenizer.ggml.add_bos_token", Bool(false)),
            (
                "tokenizer.ggml.tokens",
                Texts(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "ab"].to_vec()),
            ),
            ("tokenizer.ggml.token_type", U32s(vec![1; 16])),
            ("tokenizer.ggml.merges", Texts(vec!["a b"])),
        ];
        let shapes: [(&str, &[u64]); 12] = [
            ("token_embd.weight", &[16, 8]),
            ("blk.0.attn_norm.weight", &[8]),
            ("blk.0.attn_q.weight", &[8, 8]),
            ("blk.0.attn_k.weight", &[4, 8]),
            ("blk.0.attn_v.weight", &[4, 8]),
            ("blk.0.attn_output.weight", &[8, 8]),
            ("blk.0.ffn_norm.weight", &[8]),
            ("blk.0.ffn_gate.weight", &[12, 8]),
            ("blk.0.ffn_up.weight", &[12, 8]),
            ("blk.0.ffn_down.weight", &[8, 12]),
            ("output_norm.weight", &[8]),
            ("output.weight", &[16, 8]),
        ];
        Self { pairs, tensors: shapes.into_iter().map(|(name, shape)| (name, Tensor::zeros(shape))).collect() }
    }

    /// Sets a pair, or adds it.
    pub fn set(mut self, key: &'static str, value: Value) -> Self {
        self = self.without(key);
        self.pairs.push((key, value));
        self
    }

    /// Leaves out a pair or a tensor.
    pub fn without(mut self, name: &str) -> Self {
        self.pairs.retain(|(key, _)| *key != name);
        self.tensors.retain(|(tensor, _)| *tensor != name);
        self
    }

    /// Sets a tensor, or adds it.
    pub fn tensor(mut self, name: &'static str, tensor: Tensor) -> Self {
        self = self.without(name);
        self.tensors.push((name, tensor));
        self
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = [b"GGUF", &3_u32.to_le_bytes()[..]].concat();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            file.extend(string(key));
            file.extend(value.bytes());
        }
        let mut data = Vec::new();
        for (name, tensor) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            file.extend(string(name));
            file.extend((tensor.shape.len() as u32).to_le_bytes());
            file.extend(tensor.shape.iter().rev().flat_map(|n| n.to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }
}

impl Tensor {
    /// A tensor of f32 zeros.
    pub fn zeros(shape: &[u64]) -> Self {
        Self { shape: shape.to_vec(), kind: 0, bytes: vec![0; 4 * shape.iter().product::<u64>() as usize] }
    }
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        let array = |kind: u32, length: usize, bytes: Vec<u8>| {
            [&9_u32.to_le_bytes()[..], &kind.to_le_bytes(), &(length as u64).to_le_bytes(), &bytes].concat()
        };
        let scalar = |kind: u32, bytes: &[u8]| [&kind.to_le_bytes()[..], bytes].concat();
        match self {
            U32(number) => scalar(4, &number.to_le_bytes()),
            F32(number) => scalar(6, &number.to_le_bytes()),
            Bool(flag) => scalar(7, &[u8::from(*flag)]),
            Text(text) => scalar(8, &string(text)),
            Texts(texts) => array(8, texts.len(), texts.iter().flat_map(|text| string(text)).collect()),
            U32s(numbers) => array(4, numbers.len(), numbers.iter().flat_map(|n| n.to_le_bytes()).collect()),
        }
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
