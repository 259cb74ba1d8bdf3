use serde_json::{Value, json};

use crate::Result;
use crate::architecture::{Architecture, Pair};
use crate::config::Config;
use crate::names::{ATTENTION, MLP, MLP_NORM, SPARSE_MLP};

/// llama.cpp's number for scores that are a sigmoid's; `enum llama_expert_gating_func_type`.
const SIGMOID: u64 = 2;
/// The file's multiplier of a logarithm is this part of `mscale_all_dim`.
const LOG_MULTIPLIER: f64 = 0.1;

const LATENT: [Pair; 8] = [
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.kv_b_proj"),
    ("attn_v_b", "self_attn.kv_b_proj"),
];

const EXPERTS: [Pair; 5] = [
    ("ffn_gate_inp", "mlp.gate"),
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
];

/// DeepSeek V3, V3.1 and R1; V2 has the name too.
pub(super) const DEEPSEEK2: Architecture = Architecture {
    name: "deepseek2",
    model_type: "deepseek_v3",
    class: "DeepseekV3ForCausalLM",
    experts: true,
    layer: &[&ATTENTION, &LATENT, &MLP_NORM, &MLP, &SPARSE_MLP, &EXPERTS],
    needed: &[
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_shared_count", "n_shared_experts"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("attention.kv_lora_rank", "kv_lora_rank"),
        ("rope.dimension_count", "qk_rope_head_dim"),
    ],
    numbers: &[("expert_group_count", "n_group"), ("expert_group_used_count", "topk_group")],
    heads: latent_heads,
    more: routing,
    ..Architecture::PLAIN
};

/// DeepSeek V3.2, with an indexer in every layer.
pub(super) const DEEPSEEK32: Architecture = Architecture {
    name: "deepseek32",
    model_type: "deepseek_v32",
    class: "DeepseekV32ForCausalLM",
    layer: &[
        &ATTENTION,
        &LATENT,
        &[
            ("indexer.attn_q_b", "self_attn.indexer.wq_b"),
            ("indexer.attn_k", "self_attn.indexer.wk"),
            ("indexer.k_norm", "self_attn.indexer.k_norm"),
            ("indexer.proj", "self_attn.indexer.weights_proj"),
        ],
        &MLP_NORM,
        &MLP,
        &SPARSE_MLP,
        &EXPERTS,
    ],
    more: |config| {
        for (key, name) in [
            ("attention.indexer.head_count", "index_n_heads"),
            ("attention.indexer.key_length", "index_head_dim"),
            ("attention.indexer.top_k", "index_topk"),
        ] {
            let count = config.count(key)?;
            config.set(name, json!(count));
        }
        routing(config)
    },
    ..DEEPSEEK2
};

/// The sizes of keys and values before compression: under names of their own where the file counts its heads as those of the
/// compressed form.
fn latent_heads(config: &mut Config) -> Result<()> {
    let (mla, plain) = ("attention.key_length_mla", "attention.key_length");
    let key = if config.unsigned(mla)?.is_some() { mla } else { plain };
    let (length, rotated) = (config.count(key)?, config.count("rope.dimension_count")?);
    let Some(unrotated) = length.checked_sub(rotated) else {
        return Err(config.malformed(key, format!("at least {rotated}"), length));
    };
    let value = config.count(if key == mla { "attention.value_length_mla" } else { "attention.value_length" })?;
    let heads = config.count("attention.head_count")?;
    let rank = config.unsigned("attention.q_lora_rank")?.filter(|_| config.has("blk.0.attn_q_a.weight"));
    config.set("num_key_value_heads", json!(heads));
    config.set("qk_nope_head_dim", json!(unrotated));
    config.set("v_head_dim", json!(value));
    config.set("q_lora_rank", rank.map_or(Value::Null, |rank| json!(rank)));
    Ok(())
}

/// Where the file is silent, nothing is normalised or scaled.
fn routing(config: &mut Config) -> Result<()> {
    if config.unsigned("expert_gating_func")? != Some(SIGMOID) {
        return Err(config.unsupported("routing by a softmax (DeepSeek V2)"));
    }
    config.refuse("attention.temperature_scale")?;
    let dense = config.unsigned("leading_dense_block_count")?.unwrap_or(0);
    let normalised = config.boolean("expert_weights_norm")?.unwrap_or(false);
    let scale = config.float("expert_weights_scale")?.unwrap_or(1.0);
    config.set("first_k_dense_replace", json!(dense));
    config.set("norm_topk_prob", json!(normalised));
    config.set("routed_scaling_factor", json!(scale));
    config.set("scoring_func", json!("sigmoid"));
    config.set("topk_method", json!("noaux_tc"));
    if let Some(multiplier) = config.float("rope.scaling.yarn_log_multiplier")? {
        // through f32, which the file holds: 0.07 gives 0.7
        let all = json!(crate::metadata::shortest((multiplier / LOG_MULTIPLIER) as f32));
        config.add_to_yarn("mscale_all_dim", all.clone());
        config.add_to_yarn("mscale", all);
    }
    Ok(())
}
