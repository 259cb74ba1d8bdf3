use candle_core::DType;
use serde_json::{Map, Value, json};

use crate::architecture::{Architecture, Heads};
use crate::{Error, GgufFile, Result, SpecialToken, TensorInfo};

/// A `config.json` in the making, and the metadata it is made from; keys of the metadata without the architecture's prefix.
pub(crate) struct Config<'a> {
    pub(crate) file: &'a GgufFile,
    pub(crate) map: Map<String, Value>,
    architecture: &'static Architecture,
    heads: Heads,
    layers: u64,
}

impl GgufFile {
    /// The model's configuration under the keys of Hugging Face's `config.json`. A number that the file lacks is left out: the
    /// default of the family's class then holds, unless llama.cpp takes another.
    ///
    /// Llama 3.1 and later: the file holds a table of frequency divisors, from which the four numbers of `llama3` scaling
    /// cannot be told exactly. It comes out as `"rope_scaling": {"rope_type": "pmetal_factors", "factors": [...]}`:
    /// frequency `i` is divided by `factors[i]`.
    ///
    /// # Errors
    /// When the architecture is not known, a key is missing or of the wrong type, a layer the file states is not there, or the
    /// model needs what the architecture's form here does not have: layers of different sizes, a rotation of part of a head.
    pub fn hf_config(&self) -> Result<Value> {
        let architecture = self.architecture()?;
        let (heads, layers) = (self.heads(architecture)?, self.layers(architecture)?);
        self.require_tensor(&format!("blk.{}.attn_norm.weight", layers - 1))?;
        if layers > self.tensors().len() as u64 {
            let key = architecture.key("block_count");
            return Err(self.malformed(format!("metadata key '{key}'"), "as many layers as the file holds", layers));
        }
        let mut config = Config { file: self, map: Map::new(), architecture, heads, layers };
        config.fill()?;
        Ok(Value::Object(config.map))
    }

    /// The dtype that holds the matrices as they are, where they are all stored in one; bf16 for quantized ones.
    fn stored_dtype(&self) -> &'static str {
        let mut matrices = self.tensors().iter().filter(|tensor| tensor.shape.len() > 1).map(TensorInfo::block_type);
        let first = matrices.next().filter(|first| matrices.all(|other| other == *first));
        match first {
            Some("F32") => "float32",
            Some("F16") => "float16",
            _ => "bfloat16",
        }
    }
}

impl Config<'_> {
    fn fill(&mut self) -> Result<()> {
        let Architecture { class, model_type, epsilon, activation, needed, numbers, heads, more, .. } =
            *self.architecture;
        self.set("architectures", json!([class]));
        self.set("model_type", json!(model_type));
        self.set("hidden_size", json!(self.count("embedding_length")?));
        self.set("intermediate_size", json!(self.count("feed_forward_length")?));
        self.set("num_hidden_layers", json!(self.layers));
        self.set("num_attention_heads", json!(self.heads.query));
        self.set("num_key_value_heads", json!(self.heads.key_value));
        heads(self)?;
        self.set(activation.0, json!(activation.1));
        self.set("rope_theta", json!(self.float("rope.freq_base")?.unwrap_or(10_000.0)));
        self.set("rope_scaling", self.rope_scaling()?);
        self.set("max_position_embeddings", json!(self.count("context_length")?));
        self.set_tokens()?;
        self.set("tie_word_embeddings", json!(!self.has("output.weight")));
        self.set("attention_bias", json!(self.has("blk.0.attn_q.bias")));
        self.set("mlp_bias", json!(self.has("blk.0.ffn_gate.bias")));
        self.set("dtype", json!(self.file.stored_dtype()));
        for (key, name) in needed.iter().chain([&epsilon]) {
            let number = self.scalar(key)?;
            self.set(name, number.map_or_else(|| self.missing(key), Ok)?);
        }
        for (key, name) in numbers {
            if let Some(number) = self.scalar(key)? {
                self.set(name, number);
            }
        }
        more(self)
    }

    fn set_tokens(&mut self) -> Result<()> {
        let embedding = self.file.require_tensor("token_embd.weight")?;
        let special = self.file.special_tokens()?;
        let id = |token: Option<SpecialToken>| json!(token.map(|token| token.id));
        self.set("vocab_size", json!(embedding.shape.first()));
        self.set("bos_token_id", id(special.bos));
        self.set("eos_token_id", id(special.eos));
        self.set("pad_token_id", id(special.pad));
        Ok(())
    }

    pub(crate) fn set(&mut self, name: &str, value: Value) {
        self.map.insert(name.to_string(), value);
    }

    /// `layer_types` where the file says which layers have a window: by a flag for each, or as the last of so many having none.
    pub(crate) fn layer_types(&mut self) -> Result<()> {
        let key = self.key("attention.sliding_window_pattern");
        let slides: Vec<bool> = if self.file.is_array(&key) {
            let flags = self.file.numbers(&key)?.unwrap_or_default();
            if flags.len() as u64 != self.layers {
                let expected = format!("{} flags, one per layer", self.layers);
                return Err(self.malformed("attention.sliding_window_pattern", expected, flags.len()));
            }
            flags.iter().map(|&flag| flag != 0.0).collect()
        } else if let Some(period) = self.file.unsigned(&key)? {
            (1..=self.layers).map(|layer| period == 0 || layer % period != 0).collect()
        } else {
            return Ok(());
        };
        let names = slides.iter().map(|&slides| if slides { "sliding_attention" } else { "full_attention" });
        self.set("layer_types", names.collect());
        Ok(())
    }

    /// Numbers of one head: stated, or the hidden size over the heads. Values must be as long as keys.
    pub(crate) fn head_dim(&self) -> Result<u64> {
        let stated = self.unsigned("attention.key_length")?;
        let head_dim = stated.map_or_else(|| Ok(self.count("embedding_length")? / self.heads.query), Ok::<_, Error>)?;
        if head_dim == 0 {
            return Err(self.malformed("attention.key_length", "at least 1", head_dim));
        }
        self.refuse_other("attention.value_length", head_dim)?;
        Ok(head_dim)
    }

    /// Layers, not more than there are tensors.
    pub(crate) fn layers(&self) -> Result<usize> {
        usize::try_from(self.layers).map_err(|_| self.malformed("block_count", "fewer layers", self.layers))
    }

    /// A table of numbers that the file holds as a tensor.
    pub(crate) fn table(&self, stem: &str) -> Result<Option<Vec<f64>>> {
        let name = format!("{stem}.weight");
        if !self.has(&name) {
            return Ok(None);
        }
        let numbers = self.file.dequantize(&name, DType::F32)?.flatten_all().and_then(|table| table.to_vec1::<f32>());
        let numbers = numbers.map_err(|source| self.file.tensor_error(&name, source))?;
        Ok(Some(numbers.into_iter().map(crate::metadata::shortest).collect()))
    }

    pub(crate) fn has(&self, tensor: &str) -> bool {
        self.file.tensor(tensor).is_some()
    }

    fn key(&self, name: &str) -> String {
        self.architecture.key(name)
    }

    /// A required number of at least 1.
    pub(crate) fn count(&self, name: &str) -> Result<u64> {
        match self.unsigned(name)? {
            Some(0) => Err(self.malformed(name, "at least 1", 0)),
            Some(count) => Ok(count),
            None => self.missing(name),
        }
    }

    pub(crate) fn unsigned(&self, name: &str) -> Result<Option<u64>> {
        self.file.unsigned(&self.key(name))
    }

    pub(crate) fn float(&self, name: &str) -> Result<Option<f64>> {
        self.file.float(&self.key(name))
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>> {
        self.file.boolean(&self.key(name))
    }

    pub(crate) fn string(&self, name: &str) -> Result<Option<&str>> {
        self.file.string(&self.key(name))
    }

    fn scalar(&self, name: &str) -> Result<Option<Value>> {
        self.file.scalar(&self.key(name))
    }

    pub(crate) fn missing<T>(&self, name: &str) -> Result<T> {
        Err(Error::MissingKey { path: self.file.path.clone(), key: self.key(name) })
    }

    pub(crate) fn malformed(&self, name: &str, expected: impl Into<String>, found: impl ToString) -> Error {
        self.file.malformed(format!("metadata key '{}'", self.key(name)), expected, found)
    }

    /// An error for a key that says what the architecture's form here does not have.
    pub(crate) fn refuse(&self, name: &str) -> Result<()> {
        match self.scalar(name)? {
            Some(found) => Err(self.file.unsupported(format!("'{}' = {found}", self.key(name)))),
            None => Ok(()),
        }
    }

    pub(crate) fn refuse_unless_true(&self, name: &str) -> Result<()> {
        if self.boolean(name)?.unwrap_or(true) { Ok(()) } else { self.refuse(name) }
    }

    /// An error where a key states another length than a head's.
    pub(crate) fn refuse_other(&self, name: &str, head_dim: u64) -> Result<()> {
        match self.unsigned(name)?.filter(|&length| length != head_dim) {
            Some(length) => {
                let what = format!("'{}' = {length} beside a head size of {head_dim}", self.key(name));
                Err(self.file.unsupported(what))
            }
            None => Ok(()),
        }
    }

    pub(crate) fn unsupported(&self, what: &str) -> Error {
        self.file.unsupported(format!("{what} in architecture '{}'", self.architecture.name))
    }
}
