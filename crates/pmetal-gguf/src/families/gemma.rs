use serde_json::json;

use crate::Result;
use crate::architecture::{Architecture, Pair};
use crate::config::Config;
use crate::names::{ATTENTION, MLP, QK_NORM};

const NORMS: [Pair; 3] = [
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// Gemma 2. Where the file has no window, pattern or cap, llama.cpp's are those of the class.
pub(super) const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    layer: &[&ATTENTION, &NORMS, &MLP],
    norms_plus_one: true,
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    numbers: &[
        ("attention.sliding_window", "sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ],
    more: |config| {
        config.layer_types()?;
        score_scale(config, 46)
    },
    ..Architecture::PLAIN
};

/// Gemma 3's text part. A file without a window has full attention in every layer.
pub(super) const GEMMA3: Architecture = Architecture {
    name: "gemma3",
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    layer: &[&ATTENTION, &QK_NORM, &NORMS, &MLP],
    numbers: &[
        ("attention.sliding_window", "sliding_window"),
        ("rope.freq_base_swa", "rope_local_base_freq"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ],
    more: |config| {
        if config.unsigned("attention.sliding_window")?.unwrap_or(0) == 0 {
            config.set("layer_types", json!(vec!["full_attention"; config.layers()?]));
        } else {
            config.layer_types()?;
        }
        score_scale(config, 62)
    },
    ..GEMMA2
};

/// Scores are divided by the square root of a number the file lacks. In every released model it is the size of a head, but for
/// those of 27 billion parameters, which llama.cpp knows by their layers.
fn score_scale(config: &mut Config, layers_of_27b: usize) -> Result<()> {
    let scalar = if config.layers()? == layers_of_27b {
        config.count("embedding_length")? / config.count("attention.head_count")?
    } else {
        config.head_dim()?
    };
    config.set("query_pre_attn_scalar", json!(scalar));
    Ok(())
}
