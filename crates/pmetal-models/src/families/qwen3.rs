//! Qwen 3, dense: Llama with normalised heads of q and k, and heads of 128 whatever the width.

use pmetal_ops::AttentionSpec;

use super::{Base, Defaults, qwen2::reaches};
use crate::{AttentionBias, AttentionKind::Heads, DecoderSpec, HeadNorm, HeadsSpec, LayerSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults {
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    };
    let base = Base::read(config, defaults)?;
    let reaches = reaches(config, &base)?;
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    let bias = AttentionBias { qkv: bias, output: bias };
    Ok(base.decoder(base.layers(|index| {
        let heads = base.heads();
        let attention = AttentionSpec { reach: reaches[index], ..heads.attention };
        let head_norm = Some(HeadNorm::Rms(base.norm()));
        LayerSpec { attention: Heads(HeadsSpec { attention, bias, head_norm, ..heads }), ..base.layer() }
    })))
}
