use crate::{DecoderSpec, Result, families, keys::Keys};

/// A family of models.
pub struct Family {
    /// What its models are called.
    pub name: &'static str,
    /// Parameters of those published, from the smallest to the largest.
    pub sizes: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The models that hold one of these as their text part.
    pub holder: Option<Holder>,
    /// The class in `architectures`.
    pub architecture: &'static str,
    /// Whether its layers have experts.
    pub experts: bool,
    /// Reads its configuration.
    pub(crate) spec: fn(&Keys) -> Result<DecoderSpec>,
}

/// A model that holds another as its text part, under `text_config`.
#[derive(Clone, Copy)]
pub struct Holder {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// What precedes the names of the decoder's modules, in place of `model.`, in the class that transformers' `AutoModelForCausalLM` makes of such a
    /// configuration (5.23: `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`); adapters are for that class. None where it is the text part alone.
    pub text_module: Option<&'static str>,
}

/// Every family there is: a new one is a file in `families/` and a row here.
pub(crate) const FAMILIES: &[Family] = &[
    Family {
        name: "Llama 1 to 3.3",
        sizes: "1B-405B",
        model_type: "llama",
        holder: None,
        architecture: "LlamaForCausalLM",
        experts: false,
        spec: families::llama::spec,
    },
    Family {
        name: "Llama 4 Scout, Maverick (text)",
        sizes: "109B-400B",
        model_type: "llama4_text",
        // Llama4ForCausalLM: the text part alone
        holder: Some(Holder { model_type: "llama4", text_module: None }),
        architecture: "Llama4ForCausalLM",
        experts: true,
        spec: families::llama4::spec,
    },
    Family {
        name: "Qwen 2, 2.5",
        sizes: "0.5B-72B",
        model_type: "qwen2",
        holder: None,
        architecture: "Qwen2ForCausalLM",
        experts: false,
        spec: families::qwen2::spec,
    },
    Family {
        name: "Qwen 3",
        sizes: "0.6B-32B",
        model_type: "qwen3",
        holder: None,
        architecture: "Qwen3ForCausalLM",
        experts: false,
        spec: families::qwen3::spec,
    },
    Family {
        name: "Qwen 3 MoE",
        sizes: "30B-235B",
        model_type: "qwen3_moe",
        holder: None,
        architecture: "Qwen3MoeForCausalLM",
        experts: true,
        spec: families::qwen3_moe::spec,
    },
    Family {
        name: "DeepSeek V3, V3.1, R1",
        sizes: "671B",
        model_type: "deepseek_v3",
        holder: None,
        architecture: "DeepseekV3ForCausalLM",
        experts: true,
        spec: families::deepseek_v3::spec,
    },
    Family {
        name: "DeepSeek V3.2, V3.2-Speciale",
        sizes: "671B",
        model_type: "deepseek_v32",
        holder: None,
        architecture: "DeepseekV32ForCausalLM",
        experts: true,
        spec: families::deepseek_v32::spec,
    },
    Family {
        name: "Mistral 7B, Nemo, Small",
        sizes: "7B-24B",
        model_type: "mistral",
        holder: None,
        architecture: "MistralForCausalLM",
        experts: false,
        spec: families::mistral::spec,
    },
    Family {
        name: "Mixtral 8x7B, 8x22B",
        sizes: "47B-141B",
        model_type: "mixtral",
        holder: None,
        architecture: "MixtralForCausalLM",
        experts: true,
        spec: families::mixtral::spec,
    },
    Family {
        name: "Gemma 2",
        sizes: "2B-27B",
        model_type: "gemma2",
        holder: None,
        architecture: "Gemma2ForCausalLM",
        experts: false,
        spec: families::gemma2::spec,
    },
    Family {
        name: "Gemma 3 (text)",
        sizes: "1B-27B",
        model_type: "gemma3_text",
        // Gemma3ForConditionalGeneration: all parts
        holder: Some(Holder { model_type: "gemma3", text_module: Some("model.language_model.") }),
        architecture: "Gemma3ForCausalLM",
        experts: false,
        spec: families::gemma3::spec,
    },
    Family {
        name: "Phi 3, 3.5, 4, 4-mini",
        sizes: "3.8B-14B",
        model_type: "phi3",
        holder: None,
        architecture: "Phi3ForCausalLM",
        experts: false,
        spec: families::phi3::spec,
    },
    Family {
        name: "GPT-OSS",
        sizes: "20B-120B",
        model_type: "gpt_oss",
        holder: None,
        architecture: "GptOssForCausalLM",
        experts: true,
        spec: families::gpt_oss::spec,
    },
    Family {
        name: "Granite 3",
        sizes: "2B-8B",
        model_type: "granite",
        holder: None,
        architecture: "GraniteForCausalLM",
        experts: false,
        spec: families::granite::spec,
    },
    Family {
        name: "Granite 3 MoE",
        sizes: "1B-3B",
        model_type: "granitemoe",
        holder: None,
        architecture: "GraniteMoeForCausalLM",
        experts: true,
        spec: families::granitemoe::spec,
    },
    Family {
        name: "Command R, R+",
        sizes: "35B-104B",
        model_type: "cohere",
        holder: None,
        architecture: "CohereForCausalLM",
        experts: false,
        spec: families::cohere::spec,
    },
    Family {
        name: "Command R7B",
        sizes: "7B",
        model_type: "cohere2",
        holder: None,
        architecture: "Cohere2ForCausalLM",
        experts: false,
        spec: families::cohere2::spec,
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
