use crate::{DecoderSpec, Result, families, keys::Keys};

/// A family of models.
pub struct Family {
    /// What its models are called.
    pub name: &'static str,
    /// Parameters of those published, from the smallest to the largest.
    pub sizes: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub architecture: &'static str,
    /// Reads its configuration.
    pub(crate) spec: fn(&Keys) -> Result<DecoderSpec>,
}

/// Every family there is: a new one is a file in `families/` and a row here.
pub(crate) const FAMILIES: &[Family] = &[
    Family {
        name: "Llama 1 to 3.3",
        sizes: "1B-405B",
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        spec: families::llama::spec,
    },
    Family {
        name: "Qwen 2, 2.5",
        sizes: "0.5B-72B",
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        spec: families::qwen2::spec,
    },
    Family {
        name: "Qwen 3",
        sizes: "0.6B-32B",
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        spec: families::qwen3::spec,
    },
];

/// The families that can be loaded.
pub fn known_families() -> &'static [Family] {
    FAMILIES
}

/// The model types that can be loaded.
pub fn known_architectures() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.model_type).collect()
}
