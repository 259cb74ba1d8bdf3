use serde_json::json;

use crate::architecture::Architecture;
use crate::names::{ATTENTION, MLP, MLP_NORM, QK_NORM, SPARSE_MLP};

/// Qwen 2 and 2.5.
pub(super) const QWEN2: Architecture = Architecture {
    name: "qwen2",
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    layer: &[&ATTENTION, &MLP_NORM, &MLP],
    ..Architecture::PLAIN
};

/// Qwen 3.
pub(super) const QWEN3: Architecture = Architecture {
    name: "qwen3",
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    layer: &[&ATTENTION, &QK_NORM, &MLP_NORM, &MLP],
    ..Architecture::PLAIN
};

/// Qwen 3 with experts in every layer, whose weights llama.cpp always makes sum to 1.
pub(super) const QWEN3MOE: Architecture = Architecture {
    name: "qwen3moe",
    model_type: "qwen3_moe",
    class: "Qwen3MoeForCausalLM",
    experts: true,
    layer: &[&ATTENTION, &QK_NORM, &MLP_NORM, &SPARSE_MLP, &[("ffn_gate_inp", "mlp.gate")]],
    needed: &[
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ],
    more: |config| {
        config.set("norm_topk_prob", json!(true));
        Ok(())
    },
    ..Architecture::PLAIN
};
