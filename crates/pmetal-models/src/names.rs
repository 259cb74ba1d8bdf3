//! The names of a decoder's parts, as Hugging Face's Llama has them.

use candle_core::Shape;

use crate::DecoderSpec;

/// The embedding, `[vocab_size, hidden_size]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
/// The head, `[vocab_size, hidden_size]`, of models where it is not the embedding.
pub const HEAD: &str = "lm_head.weight";
/// The prefix of layer names.
pub(crate) const LAYERS: &str = "model.layers.";

/// A linear layer of a decoder layer: its module's name, its widths, whether it has a bias.
pub(crate) struct LinearShape {
    pub(crate) module: &'static str,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) bias: bool,
}

/// The linear layers of a decoder layer, by what reads the same input: q, k, v; output; gate, up; down.
pub(crate) fn linear_groups(spec: &DecoderSpec) -> [Vec<LinearShape>; 4] {
    let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
    let (q, kv) = (spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim);
    let (qkv_bias, output_bias) = (spec.attention_bias.qkv, spec.attention_bias.output);
    let linear = |module, inputs, outputs, bias| LinearShape { module, inputs, outputs, bias };
    [
        vec![
            linear("self_attn.q_proj", hidden, q, qkv_bias),
            linear("self_attn.k_proj", hidden, kv, qkv_bias),
            linear("self_attn.v_proj", hidden, kv, qkv_bias),
        ],
        vec![linear("self_attn.o_proj", q, hidden, output_bias)],
        vec![
            linear("mlp.gate_proj", hidden, inner, spec.mlp_bias),
            linear("mlp.up_proj", hidden, inner, spec.mlp_bias),
        ],
        vec![linear("mlp.down_proj", inner, hidden, spec.mlp_bias)],
    ]
}

/// The norms before attention and before the MLP.
pub(crate) const BLOCK_NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];
/// The norms of the heads of q and of k.
pub(crate) const HEAD_NORMS: [&str; 2] = ["self_attn.q_norm", "self_attn.k_norm"];

/// The norms of a decoder layer and their widths.
fn norms(spec: &DecoderSpec) -> impl Iterator<Item = (&'static str, usize)> {
    let heads = HEAD_NORMS.iter().filter(|_| spec.qk_norm).map(|&name| (name, spec.head_dim));
    BLOCK_NORMS.iter().map(|&name| (name, spec.hidden_size)).chain(heads)
}

/// Every linear layer of a decoder's attention and MLP: its module's name, `[out, in]` of its weight.
pub fn linear_layers(spec: &DecoderSpec) -> Vec<(String, [usize; 2])> {
    let layer = |index: usize| {
        let linears = linear_groups(spec).into_iter().flatten();
        linears.map(move |linear| (format!("{LAYERS}{index}.{}", linear.module), [linear.outputs, linear.inputs]))
    };
    (0..spec.num_hidden_layers).flat_map(layer).collect()
}

/// Every tensor of a decoder under its Hugging Face name, with its shape, from the embedding to the head (which a tied decoder
/// has none of).
pub fn tensors_of(spec: &DecoderSpec) -> Vec<(String, Shape)> {
    let table = Shape::from((spec.vocab_size, spec.hidden_size));
    let mut tensors = vec![(EMBEDDING.to_owned(), table.clone())];
    for layer in 0..spec.num_hidden_layers {
        for linear in linear_groups(spec).into_iter().flatten() {
            let module = format!("{LAYERS}{layer}.{}", linear.module);
            tensors.push((format!("{module}.weight"), Shape::from((linear.outputs, linear.inputs))));
            if linear.bias {
                tensors.push((format!("{module}.bias"), Shape::from(linear.outputs)));
            }
        }
        for (norm, width) in norms(spec) {
            tensors.push((format!("{LAYERS}{layer}.{norm}.weight"), Shape::from(width)));
        }
    }
    tensors.push((NORM.to_owned(), Shape::from(spec.hidden_size)));
    if !spec.tie_word_embeddings {
        tensors.push((HEAD.to_owned(), table));
    }
    tensors
}
