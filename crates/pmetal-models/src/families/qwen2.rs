//! Qwen 2 and 2.5, dense: Llama with biases on q, k and v.

use super::{Defaults, dense, refuse_sliding_windows};
use crate::{AttentionBias, DecoderSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults { num_key_value_heads: Some(32), head_dim: None, max_position_embeddings: 32_768 };
    let dense = dense(config, defaults)?;
    refuse_sliding_windows(config, dense.num_hidden_layers)?;
    Ok(DecoderSpec { attention_bias: AttentionBias { qkv: true, output: false }, ..dense })
}
