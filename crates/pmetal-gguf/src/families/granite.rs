use super::llama::{LLAMA, MIXTRAL};
use crate::Result;
use crate::architecture::{Architecture, Pair};
use crate::config::Config;
use crate::names::{ATTENTION, MLP_NORM};

const SCALES: [Pair; 2] = [("embedding_scale", "embedding_multiplier"), ("residual_scale", "residual_multiplier")];

/// Granite 3.0 to 3.3.
pub(super) const GRANITE: Architecture = Architecture {
    name: "granite",
    model_type: "granite",
    class: "GraniteForCausalLM",
    needed: &[("attention.scale", "attention_multiplier"), ("logit_scale", "logits_scaling")],
    numbers: &SCALES,
    more: without_more,
    ..LLAMA
};

/// The same with experts.
pub(super) const GRANITEMOE: Architecture = Architecture {
    name: "granitemoe",
    model_type: "granitemoe",
    class: "GraniteMoeForCausalLM",
    layer: &[
        &ATTENTION,
        &MLP_NORM,
        &[
            ("ffn_gate_inp", "block_sparse_moe.router.layer"),
            ("ffn_gate_exps", "block_sparse_moe.experts.gate_proj"),
            ("ffn_up_exps", "block_sparse_moe.experts.up_proj"),
            ("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj"),
            ("ffn_down_exps", "block_sparse_moe.experts.down_proj"),
        ],
    ],
    needed: &[
        ("attention.scale", "attention_multiplier"),
        ("logit_scale", "logits_scaling"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
    ],
    numbers: &SCALES,
    more: without_more,
    ..MIXTRAL
};

/// What the name also covers in llama.cpp, and no family here has: models without rotation.
fn without_more(config: &mut Config) -> Result<()> {
    config.refuse_unless_true("rope.scaling.finetuned")
}
