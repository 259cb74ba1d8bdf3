use serde_json::{Value, json};

use crate::Result;
use crate::architecture::Architecture;
use crate::config::Config;
use crate::names::{ATTENTION, MLP_NORM};

const LONG: &str = "rope_factors_long";
const SHORT: &str = "rope_factors_short";

/// Phi 3 to 4-mini: q, k and v in one matrix, gate and up in another.
pub(super) const PHI3: Architecture = Architecture {
    name: "phi3",
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    layer: &[
        &ATTENTION,
        &MLP_NORM,
        &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj"), ("ffn_down", "mlp.down_proj")],
    ],
    tables: &[LONG, SHORT],
    numbers: &[("rope.scaling.original_context_length", "original_max_position_embeddings")],
    heads: partly_rotated,
    more: long_context,
    ..Architecture::PLAIN
};

fn partly_rotated(config: &mut Config) -> Result<()> {
    let head_dim = config.head_dim()?;
    let rotated = config.unsigned("rope.dimension_count")?.unwrap_or(head_dim);
    config.set("head_dim", json!(head_dim));
    config.set("partial_rotary_factor", json!(rotated as f64 / head_dim as f64));
    Ok(())
}

/// A window of 0 means that there is none. The scale of cos and sin that the file also states is what the class computes from the
/// two lengths.
fn long_context(config: &mut Config) -> Result<()> {
    let window = config.unsigned("attention.sliding_window")?.filter(|&window| window > 0);
    config.set("sliding_window", window.map_or(Value::Null, |window| json!(window)));
    if let (Some(long), Some(short)) = (config.table(LONG)?, config.table(SHORT)?) {
        let scaling = json!({"type": "longrope", "long_factor": long, "short_factor": short});
        config.set("rope_scaling", scaling);
    }
    Ok(())
}
