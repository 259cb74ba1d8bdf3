use serde_json::json;

use crate::architecture::Architecture;
use crate::names::{ATTENTION, SPARSE_MLP};

/// GPT-OSS. Its range of interpolated frequencies has no whole ends, in any released model; the file has no key for that.
pub(super) const GPT_OSS: Architecture = Architecture {
    name: "gpt-oss",
    model_type: "gpt_oss",
    class: "GptOssForCausalLM",
    experts: true,
    layer: &[
        &ATTENTION,
        &SPARSE_MLP,
        &[
            ("attn_sinks.weight", "self_attn.sinks"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_gate_inp", "mlp.router"),
        ],
    ],
    needed: &[
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "intermediate_size"),
        ("attention.sliding_window", "sliding_window"),
    ],
    more: |config| {
        config.layer_types()?;
        config.add_to_yarn("truncate", json!(false));
        Ok(())
    },
    ..Architecture::PLAIN
};
