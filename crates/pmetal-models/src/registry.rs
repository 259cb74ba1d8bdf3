use crate::{DecoderSpec, Result, families, keys::Keys};

/// A family of models.
pub(crate) struct Family {
    /// `model_type` in `config.json`.
    pub(crate) model_type: &'static str,
    /// The class in `architectures`.
    pub(crate) architecture: &'static str,
    /// Reads its configuration.
    pub(crate) spec: fn(&Keys) -> Result<DecoderSpec>,
}

/// Every family there is: a new one is a file in `families/` and a row here.
pub(crate) const FAMILIES: &[Family] = &[
    Family { model_type: "llama", architecture: "LlamaForCausalLM", spec: families::llama::spec },
    Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", spec: families::qwen2::spec },
    Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", spec: families::qwen3::spec },
];

/// The model types that can be loaded.
pub fn known_architectures() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.model_type).collect()
}
