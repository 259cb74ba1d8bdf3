use serde_json::{Value, json};

use crate::Result;
use crate::architecture::Architecture;
use crate::config::Config;
use crate::names::{ATTENTION, MLP, MLP_NORM};

/// Llama 2 to 3.3. Mistral 7B, Nemo and Small 3 are converted to it too, without their window: no layer of theirs then slides.
pub(super) const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    layer: &[&ATTENTION, &MLP_NORM, &MLP],
    pairs_adjacent: true,
    ..Architecture::PLAIN
};

/// Mixtral, of the same name.
pub(super) const MIXTRAL: Architecture = Architecture {
    model_type: "mixtral",
    class: "MixtralForCausalLM",
    experts: true,
    layer: &[
        &ATTENTION,
        &MLP_NORM,
        &[
            ("ffn_gate_inp", "block_sparse_moe.gate"),
            ("ffn_gate_exps", "block_sparse_moe.experts.gate_proj"),
            ("ffn_up_exps", "block_sparse_moe.experts.up_proj"),
            ("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj"),
            ("ffn_down_exps", "block_sparse_moe.experts.down_proj"),
        ],
    ],
    needed: &[("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")],
    ..LLAMA
};

/// Mistral Small 3.1 and later.
pub(super) const MISTRAL3: Architecture = Architecture {
    name: "mistral3",
    model_type: "mistral",
    class: "MistralForCausalLM",
    more: without_temperature,
    ..LLAMA
};

/// Llama 4, whose rows stay in order: its rotation takes neighbouring pairs in Hugging Face's form as well.
pub(super) const LLAMA4: Architecture = Architecture {
    name: "llama4",
    model_type: "llama4_text",
    class: "Llama4ForCausalLM",
    experts: true,
    layer: &[
        &ATTENTION,
        &MLP_NORM,
        &[
            ("ffn_gate", "feed_forward.gate_proj"),
            ("ffn_up", "feed_forward.up_proj"),
            ("ffn_down", "feed_forward.down_proj"),
            ("ffn_gate_inp", "feed_forward.router"),
            ("ffn_gate_exps", "feed_forward.experts.gate_proj"),
            ("ffn_up_exps", "feed_forward.experts.up_proj"),
            ("ffn_gate_up_exps", "feed_forward.experts.gate_up_proj"),
            ("ffn_down_exps", "feed_forward.experts.down_proj"),
            ("ffn_gate_shexp", "feed_forward.shared_expert.gate_proj"),
            ("ffn_up_shexp", "feed_forward.shared_expert.up_proj"),
            ("ffn_down_shexp", "feed_forward.shared_expert.down_proj"),
        ],
    ],
    needed: &[
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("feed_forward_length", "intermediate_size_mlp"),
        ("expert_feed_forward_length", "intermediate_size"),
        ("interleave_moe_layer_step", "interleave_moe_layer_step"),
    ],
    more: llama4,
    ..Architecture::PLAIN
};

/// Ministral 3 scales its queries by position, which no family here has.
fn without_temperature(config: &mut Config) -> Result<()> {
    config.refuse("attention.temperature_scale")?;
    config.set("sliding_window", Value::Null);
    Ok(())
}

/// llama.cpp knows Maverick by its experts: it alone has no norm of q and k. The file has no key for that, nor for the size of
/// chunks, which is the class's; a window of 0 says that nothing is cut into chunks.
fn llama4(config: &mut Config) -> Result<()> {
    config.set("use_qk_norm", json!(config.unsigned("expert_count")? != Some(128)));
    if config.unsigned("attention.sliding_window")? == Some(0) {
        let layers = config.layers()?;
        config.set("layer_types", json!(vec!["full_attention"; layers]));
        config.set("no_rope_layers", json!(vec![1; layers]));
        config.set("attn_temperature_tuning", json!(false));
    }
    Ok(())
}
