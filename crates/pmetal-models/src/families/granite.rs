//! Granite 3.0 to 3.3, dense: Llama with factors on embedding, scores, residuals and logits.

use pmetal_ops::{AttentionSpec, LogitsSpec};

use super::{Base, Defaults};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, GatedSpec, HeadsSpec, LayerSpec, MlpSpec, Result, keys::Keys,
};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(config, Defaults::default())?;
    let bias = config.boolean("mlp_bias")?.unwrap_or(false);
    decoder(config, &base, &MlpSpec::Gated(GatedSpec { bias, ..base.gated() }))
}

/// The decoder whose layers have this MLP.
pub(super) fn decoder(config: &Keys, base: &Base, mlp: &MlpSpec) -> Result<DecoderSpec> {
    let factor = |key: &str| Ok::<_, crate::Error>(config.positive(key)?.unwrap_or(1.0));
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    let (scale, residual_multiplier) = (factor("attention_multiplier")? as f32, factor("residual_multiplier")?);
    let layers = base.layers(|_| {
        let heads = base.heads();
        let attention = AttentionSpec { scale, ..heads.attention };
        let attention = Heads(HeadsSpec { attention, bias: AttentionBias { qkv: bias, output: bias }, ..heads });
        LayerSpec { attention, mlp: mlp.clone(), residual_multiplier, ..base.layer() }
    });
    Ok(DecoderSpec {
        embedding_multiplier: factor("embedding_multiplier")?,
        logits: LogitsSpec { scale: (1.0 / factor("logits_scaling")?) as f32, ..LogitsSpec::default() },
        ..base.decoder(layers)
    })
}
