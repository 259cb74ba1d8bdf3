//! Tensor names: llama.cpp's on the left, those of Hugging Face's checkpoints on the right.
//! The architectures [`crate::ARCHITECTURES`] share one table; a family simply lacks what it has no use for.

/// Tensors that occur once, without `.weight` or `.bias`.
const MODEL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a layer, between `blk.N.` or `model.layers.N.` and `.weight` or `.bias`.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

const LAYER_PREFIXES: (&str, &str) = ("blk.", "model.layers.");

/// Tensors that are tables, not weights: rotary frequencies, which the configuration carries.
const TABLES: [&str; 2] = ["rope_freqs", "attn_rot_embd"];

/// The Hugging Face name of a tensor, from its name in the file.
pub(crate) fn to_hf(gguf: &str) -> Option<String> {
    translate(gguf, LAYER_PREFIXES.0, LAYER_PREFIXES.1, |pair| *pair)
}

/// The name in the file of a tensor, from its Hugging Face name.
pub(crate) fn to_gguf(hf: &str) -> Option<String> {
    translate(hf, LAYER_PREFIXES.1, LAYER_PREFIXES.0, |&(gguf, hf)| (hf, gguf))
}

/// Whether a tensor of the file is a table that has no counterpart in a Hugging Face checkpoint.
pub(crate) fn is_table(gguf: &str) -> bool {
    let stem = gguf.strip_suffix(".weight").unwrap_or(gguf);
    let stem = stem.rsplit('.').next().unwrap_or(stem);
    TABLES.contains(&stem)
}

fn translate(
    name: &str,
    from_prefix: &str,
    to_prefix: &str,
    direction: impl Fn(&(&'static str, &'static str)) -> (&'static str, &'static str),
) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    if !matches!(suffix, "weight" | "bias") {
        return None;
    }
    let find = |table: &[(&'static str, &'static str)], stem: &str| {
        table.iter().map(&direction).find(|(from, _)| *from == stem).map(|(_, to)| to)
    };
    let Some(in_layer) = stem.strip_prefix(from_prefix) else {
        return Some(format!("{}.{suffix}", find(&MODEL, stem)?));
    };
    let (layer, stem) = in_layer.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    Some(format!("{to_prefix}{layer}.{}.{suffix}", find(&LAYER, stem)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Right-hand sides as `gguf.TensorNameMap(MODEL_ARCH.QWEN3, 36).get_name(...)` of llama.cpp's Python package maps them.
    #[test]
    fn names_translate_both_ways() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("blk.35.attn_k_norm.weight", "model.layers.35.self_attn.k_norm.weight"),
            ("blk.7.attn_output.weight", "model.layers.7.self_attn.o_proj.weight"),
            ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
            ("blk.12.ffn_down.weight", "model.layers.12.mlp.down_proj.weight"),
        ] {
            assert_eq!(to_hf(gguf).as_deref(), Some(hf));
            assert_eq!(to_gguf(hf).as_deref(), Some(gguf));
        }
    }

    #[test]
    fn other_names_are_none() {
        for name in
            ["blk.0.ffn_gate_exps.weight", "blk.x.attn_q.weight", "token_embd", "token_embd.scale", "blk.0.weight", ""]
        {
            assert_eq!(to_hf(name), None, "{name}");
        }
        assert!(is_table("rope_freqs.weight") && is_table("blk.3.attn_rot_embd.weight") && !is_table("output.weight"));
    }
}
