//! Llama 2, 3, 3.1, 3.2, 3.3, and what took over its layout: optional biases everywhere.

use super::{Base, Defaults};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, GatedSpec, HeadsSpec, LayerSpec, MlpSpec, Result, keys::Keys,
};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(config, Defaults::default())?;
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    let mlp_bias = config.boolean("mlp_bias")?.unwrap_or(false);
    Ok(base.decoder(base.layers(|_| LayerSpec {
        attention: Heads(HeadsSpec { bias: AttentionBias { qkv: bias, output: bias }, ..base.heads() }),
        mlp: MlpSpec::Gated(GatedSpec { bias: mlp_bias, ..base.gated() }),
        ..base.layer()
    })))
}
