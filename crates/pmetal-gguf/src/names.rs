//! Tensor names: llama.cpp's on the left, those of Hugging Face's checkpoints on the right.
//!
//! A layer's names stand between `blk.N.` or `model.layers.N.` and `.weight` or `.bias`; where the two differ in that as well, the
//! left name has it and the right one is whole. Experts lie in one tensor, the outermost dimension counting them: Hugging Face's
//! files have them in several forms, here they are called `….experts.gate_proj.weight` `[experts, intermediate, hidden]`,
//! `….experts.up_proj.weight`, `….experts.down_proj.weight` `[experts, hidden, intermediate]`, or, gate above up,
//! `….experts.gate_up_proj.weight`.

use crate::architecture::{Architecture, Pair};

/// Tensors that occur once, without `.weight` or `.bias`.
const MODEL: [Pair; 3] = [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Attention, and the norm before it.
pub(crate) const ATTENTION: [Pair; 5] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
];
/// Norms of queries and keys.
pub(crate) const QK_NORM: [Pair; 2] = [("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
/// The norm before the MLP.
pub(crate) const MLP_NORM: [Pair; 1] = [("ffn_norm", "post_attention_layernorm")];
/// A dense MLP.
pub(crate) const MLP: [Pair; 3] =
    [("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")];
/// Experts in place of a dense MLP.
pub(crate) const SPARSE_MLP: [Pair; 4] = [
    ("ffn_gate_exps", "mlp.experts.gate_proj"),
    ("ffn_up_exps", "mlp.experts.up_proj"),
    ("ffn_gate_up_exps", "mlp.experts.gate_up_proj"),
    ("ffn_down_exps", "mlp.experts.down_proj"),
];

/// The layer of a tensor, and its name in there.
pub(crate) fn in_layer(gguf: &str) -> Option<(u64, &str)> {
    let (layer, name) = gguf.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, name))
}

/// The Hugging Face name of a tensor, from its name in the file.
pub(crate) fn to_hf(architecture: &Architecture, gguf: &str) -> Option<String> {
    let Some((layer, name)) = in_layer(gguf) else { return translate(MODEL.iter(), gguf) };
    let pairs = architecture.layer.iter().copied().flatten();
    Some(format!("model.layers.{layer}.{}", translate(pairs, name)?))
}

/// Whether a tensor of the file is a table that has no counterpart in a Hugging Face checkpoint.
pub(crate) fn is_table(architecture: &Architecture, gguf: &str) -> bool {
    let stem = gguf.strip_suffix(".weight").unwrap_or(gguf);
    architecture.tables.contains(&in_layer(stem).map_or(stem, |(_, name)| name))
}

fn translate(mut pairs: impl Iterator<Item = &'static Pair>, name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let (from, to) = pairs.find(|(from, _)| *from == name || *from == stem)?;
    match suffix {
        _ if *from == name => Some((*to).to_string()),
        "weight" | "bias" => Some(format!("{to}.{suffix}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::KNOWN;

    fn hf(architecture: &str, gguf: &str) -> Option<String> {
        to_hf(KNOWN.iter().rfind(|known| known.name == architecture).unwrap(), gguf)
    }

    /// Right-hand sides as `gguf.TensorNameMap(MODEL_ARCH.QWEN3, 36).get_name(...)` of llama.cpp's Python package maps them.
    #[test]
    fn names_are_translated() {
        for (gguf, wanted) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.35.attn_k_norm.weight", "model.layers.35.self_attn.k_norm.weight"),
            ("blk.7.attn_output.weight", "model.layers.7.self_attn.o_proj.weight"),
            ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
            ("blk.12.ffn_down.weight", "model.layers.12.mlp.down_proj.weight"),
        ] {
            assert_eq!(hf("qwen3", gguf).as_deref(), Some(wanted));
        }
        assert_eq!(hf("gpt-oss", "blk.1.attn_sinks.weight").as_deref(), Some("model.layers.1.self_attn.sinks"));
        assert_eq!(hf("gpt-oss", "blk.1.attn_sinks.bias"), None);
        let bias = hf("deepseek2", "blk.3.exp_probs_b.bias");
        assert_eq!(bias.as_deref(), Some("model.layers.3.mlp.gate.e_score_correction_bias"));
    }

    #[test]
    fn other_names_are_none() {
        for name in
            ["blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "token_embd", "token_embd.scale", "blk.0.weight", ""]
        {
            assert_eq!(hf("qwen3", name), None, "{name}");
        }
        let known = |name: &str| KNOWN.iter().find(|known| known.name == name).unwrap();
        let llama = known("llama");
        assert!(is_table(llama, "rope_freqs.weight") && is_table(llama, "blk.3.attn_rot_embd.weight"));
        assert!(!is_table(llama, "output.weight") && !is_table(llama, "rope_factors_long.weight"));
        assert!(is_table(known("phi3"), "rope_factors_long.weight"));
    }
}
