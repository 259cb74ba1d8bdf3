use serde_json::json;

use crate::architecture::Architecture;
use crate::names::{ATTENTION, MLP, QK_NORM};

/// Command R and R+, whose larger model alone has norms of q and k, one for each head.
pub(super) const COMMAND_R: Architecture = Architecture {
    name: "command-r",
    model_type: "cohere",
    class: "CohereForCausalLM",
    layer: &[&ATTENTION, &QK_NORM, &MLP],
    epsilon: ("attention.layer_norm_epsilon", "layer_norm_eps"),
    needed: &[("logit_scale", "logit_scale")],
    more: |config| {
        config.set("use_qk_norm", json!(config.has("blk.0.attn_q_norm.weight")));
        Ok(())
    },
    ..Architecture::PLAIN
};

/// Command R7B.
pub(super) const COHERE2: Architecture = Architecture {
    name: "cohere2",
    model_type: "cohere2",
    class: "Cohere2ForCausalLM",
    layer: &[&ATTENTION, &MLP],
    needed: &[("logit_scale", "logit_scale"), ("attention.sliding_window", "sliding_window")],
    more: |config| config.layer_types(),
    ..COMMAND_R
};
