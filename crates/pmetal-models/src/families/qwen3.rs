//! Qwen 3, dense: Llama with normalised heads of q and k, and heads of 128 whatever the width.

use super::{Defaults, dense, refuse_sliding_windows};
use crate::{AttentionBias, DecoderSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults { num_key_value_heads: Some(32), head_dim: Some(128), max_position_embeddings: 32_768 };
    let dense = dense(config, defaults)?;
    refuse_sliding_windows(config, dense.num_hidden_layers)?;
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    Ok(DecoderSpec { attention_bias: AttentionBias { qkv: bias, output: bias }, qk_norm: true, ..dense })
}
