use candle_core::DType;
use serde_json::{Map, Value, json};

use crate::architecture::{Architecture, Heads};
use crate::{Error, GgufFile, Result, SpecialToken, TensorInfo};

/// Rotary factors of Llama 3.1 and later, one divisor per frequency.
const ROPE_FACTORS: &str = "rope_freqs.weight";

impl GgufFile {
    /// The model's configuration under the keys of Hugging Face's `config.json`.
    ///
    /// Llama 3.1 and later: the file holds a table of frequency divisors, from which the four numbers of `llama3` scaling
    /// cannot be told exactly. It comes out as `"rope_scaling": {"rope_type": "pmetal_factors", "factors": [...]}`:
    /// frequency `i` is divided by `factors[i]`.
    ///
    /// # Errors
    /// When the architecture is not known, a key is missing or of the wrong type, a layer the file states is not there, or the
    /// model needs what the architecture's plain form does not have: experts, layers of different sizes, partial rotation.
    pub fn hf_config(&self) -> Result<Value> {
        let architecture = self.architecture()?;
        let key = |name: &str| format!("{}.{name}", architecture.name);
        let count = |name: &str| self.count(&key(name));
        self.refuse_experts(&key("expert_count"))?;
        let heads = self.heads(architecture)?;
        let hidden_size = count("embedding_length")?;
        let layers = count("block_count")?;
        self.require_tensor(&format!("blk.{}.attn_norm.weight", layers - 1))?;
        let epsilon_key = key("attention.layer_norm_rms_epsilon");
        let embedding = self.require_tensor("token_embd.weight")?;
        let special = self.special_tokens()?;
        let id = |token: Option<SpecialToken>| token.map(|token| token.id);

        let mut config = Map::new();
        let mut set = |name: &str, value: Value| config.insert(name.to_string(), value);
        set("architectures", json!([architecture.class]));
        set("model_type", json!(architecture.name));
        set("hidden_size", json!(hidden_size));
        set("intermediate_size", json!(count("feed_forward_length")?));
        set("num_hidden_layers", json!(layers));
        set("num_attention_heads", json!(heads.query));
        set("num_key_value_heads", json!(heads.key_value));
        set("head_dim", json!(self.head_dim(architecture, hidden_size, heads)?));
        set("hidden_act", json!("silu"));
        set("rms_norm_eps", json!(self.required(&epsilon_key, self.float(&epsilon_key)?)?));
        set("rope_theta", json!(self.float(&key("rope.freq_base"))?.unwrap_or(10_000.0)));
        set("rope_scaling", self.rope_scaling(architecture)?);
        set("max_position_embeddings", json!(count("context_length")?));
        set("vocab_size", json!(embedding.shape.first()));
        set("tie_word_embeddings", json!(self.tensor("output.weight").is_none()));
        set("attention_bias", json!(self.tensor("blk.0.attn_q.bias").is_some()));
        set("mlp_bias", json!(self.tensor("blk.0.ffn_gate.bias").is_some()));
        set("bos_token_id", json!(id(special.bos)));
        set("eos_token_id", json!(id(special.eos)));
        set("pad_token_id", json!(id(special.pad)));
        set("dtype", json!(self.stored_dtype()));
        Ok(Value::Object(config))
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

    /// A required number of at least 1.
    fn count(&self, key: &str) -> Result<u64> {
        match self.required(key, self.unsigned(key)?)? {
            0 => Err(self.malformed(format!("metadata key '{key}'"), "at least 1", 0)),
            count => Ok(count),
        }
    }

    fn refuse_experts(&self, key: &str) -> Result<()> {
        match self.unsigned(key)? {
            Some(experts) if experts > 0 => Err(self.unsupported(format!("a mixture of {experts} experts in GGUF"))),
            _ => Ok(()),
        }
    }

    /// Rows of one head: stated, or the hidden size over the heads. Key, value and rotated part must all be that long.
    fn head_dim(&self, architecture: &Architecture, hidden_size: u64, heads: Heads) -> Result<u64> {
        let stated = |name: &str| {
            let key = format!("{}.{name}", architecture.name);
            Ok::<_, Error>(self.unsigned(&key)?.map(|length| (key, length)))
        };
        let head_dim = stated("attention.key_length")?.map_or(hidden_size / heads.query, |(_, length)| length);
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some((key, length)) = stated(name)?.filter(|&(_, length)| length != head_dim) {
                return Err(self.unsupported(format!("'{key}' = {length} beside a head size of {head_dim}")));
            }
        }
        Ok(head_dim)
    }

    fn rope_scaling(&self, architecture: &Architecture) -> Result<Value> {
        let key = |name: &str| format!("{}.rope.{name}", architecture.name);
        if self.tensor(ROPE_FACTORS).is_some() {
            let factors = self.dequantize(ROPE_FACTORS, DType::F32)?;
            let factors = factors.flatten_all().and_then(|factors| factors.to_vec1::<f32>());
            let factors = factors.map_err(|source| Error::Tensor {
                path: self.path.clone(),
                tensor: ROPE_FACTORS.to_string(),
                source: Box::new(source),
            })?;
            return Ok(json!({"rope_type": "pmetal_factors", "factors": factors}));
        }
        let type_key = key("scaling.type");
        // Files of 2023 have the linear factor alone, under a key of its own.
        let old_factor = self.float(&key("scale_linear"))?.filter(|&factor| factor != 1.0);
        let kind = self.string(&type_key)?.unwrap_or(if old_factor.is_some() { "linear" } else { "none" });
        let factor_key = key("scaling.factor");
        let factor = || self.required(&factor_key, self.float(&factor_key)?.or(old_factor));
        match kind {
            "none" => Ok(Value::Null),
            "linear" => Ok(json!({"rope_type": "linear", "factor": factor()?})),
            "yarn" => {
                let original = self.count(&key("scaling.original_context_length"))?;
                Ok(json!({"rope_type": "yarn", "factor": factor()?, "original_max_position_embeddings": original}))
            }
            other => Err(Error::Unknown {
                path: self.path.clone(),
                what: "rope scaling",
                found: other.to_string(),
                known: "none, linear, yarn".to_string(),
            }),
        }
    }
}
