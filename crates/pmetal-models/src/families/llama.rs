//! Llama 2, 3, 3.1, 3.2, 3.3, and what took over its layout: optional biases everywhere, `llama3` rope scaling.

use super::{Defaults, dense};
use crate::{AttentionBias, DecoderSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults { num_key_value_heads: None, head_dim: None, max_position_embeddings: 2048 };
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    Ok(DecoderSpec {
        attention_bias: AttentionBias { qkv: bias, output: bias },
        mlp_bias: config.boolean("mlp_bias")?.unwrap_or(false),
        ..dense(config, defaults)?
    })
}
