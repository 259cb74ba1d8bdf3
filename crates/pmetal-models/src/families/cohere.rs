//! Command R and R+: attention and MLP side by side behind one LayerNorm, neighbouring columns turning in pairs, a factor on the logits.

use pmetal_ops::{LogitsSpec, RopeLayout};

use super::{Base, Defaults};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, HeadNorm, HeadsSpec, LayerSpec, NormPlaces, NormSpec, Result,
    RopeUse, keys::Keys,
};

/// What the files of this family and the next leave unsaid.
pub(super) fn defaults() -> Defaults {
    Defaults {
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        eps: ("layer_norm_eps", 1e-5),
        ..Defaults::default()
    }
}

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(config, Defaults { rope_theta: 500_000.0, ..defaults() })?;
    let has_norm = config.boolean("use_qk_norm")?.unwrap_or(false);
    let heads = heads(config, &base)?;
    let heads = HeadsSpec { head_norm: has_norm.then_some(HeadNorm::Layer { eps: base.eps }), ..heads };
    decoder(config, &base, base.layers(|_| layer(&base, heads.clone())))
}

pub(super) fn heads(config: &Keys, base: &Base) -> Result<HeadsSpec> {
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    Ok(HeadsSpec { bias: AttentionBias { qkv: bias, output: bias }, ..base.heads() })
}

pub(super) fn layer(base: &Base, heads: HeadsSpec) -> LayerSpec {
    LayerSpec { attention: Heads(heads), norms: NormPlaces::Shared, ..base.layer() }
}

/// The decoder of these layers.
pub(super) fn decoder(config: &Keys, base: &Base, layers: Vec<LayerSpec>) -> Result<DecoderSpec> {
    let scale = config.positive("logit_scale")?.unwrap_or(0.0625) as f32;
    let layout = RopeLayout { interleaved: true, ..RopeLayout::whole(base.head_dim) };
    Ok(DecoderSpec {
        norm: NormSpec::Layer { eps: base.eps },
        ropes: vec![RopeUse { layout, ..base.rope() }],
        logits: LogitsSpec { scale, ..LogitsSpec::default() },
        ..base.decoder(layers)
    })
}
