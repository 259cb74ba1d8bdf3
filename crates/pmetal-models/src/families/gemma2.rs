//! Gemma 2: norms around attention and MLP, with weights around zero; caps on scores and logits; every other layer sees a window only.

use pmetal_ops::{Activation, AttentionSpec, LogitsSpec, RmsNorm};

use super::{Base, Defaults, sliding_window};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, HeadsSpec, LayerSpec, NormPlaces, NormSpec, Result, keys::Keys,
};

/// What the files of this family and the next leave unsaid.
pub(super) fn defaults() -> Defaults {
    Defaults {
        num_attention_heads: Some(8),
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        activation: ("hidden_activation", "gelu_pytorch_tanh", Activation::GeluTanh),
        ..Defaults::default()
    }
}

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(config, defaults())?;
    let reaches = base.reaches(config, sliding_window(config, 4096)?, |index| index % 2 == 0)?;
    let softcap = cap(config, "attn_logit_softcapping", Some(50.0))?;
    let heads = heads(config, &base)?;
    let layers = base.layers(|index| {
        let attention = AttentionSpec { reach: reaches[index], softcap, ..heads.attention };
        let attention = Heads(HeadsSpec { attention, ..heads.clone() });
        LayerSpec { attention, norms: NormPlaces::Around, ..base.layer() }
    });
    decoder(config, &base, layers, Some(30.0))
}

/// Heads whose scores have a scale of their own.
pub(super) fn heads(config: &Keys, base: &Base) -> Result<HeadsSpec> {
    let scale = 1.0 / (config.positive("query_pre_attn_scalar")?.unwrap_or(256.0) as f32).sqrt();
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    let heads = base.heads();
    let attention = AttentionSpec { scale, ..heads.attention };
    Ok(HeadsSpec { attention, bias: AttentionBias { qkv: bias, output: bias }, ..heads })
}

/// A norm whose weights lie around zero.
pub(super) fn norm(base: &Base) -> RmsNorm {
    RmsNorm { weight_offset: 1.0, rounds_first: false, ..base.norm() }
}

/// A cap; null is none.
fn cap(config: &Keys, key: &'static str, default: Option<f64>) -> Result<Option<f32>> {
    let stated = if config.has(key) { config.positive(key)? } else { default };
    Ok(stated.map(|cap| cap as f32))
}

/// The decoder of these layers, whose logits have a cap.
pub(super) fn decoder(
    config: &Keys,
    base: &Base,
    layers: Vec<LayerSpec>,
    default_cap: Option<f64>,
) -> Result<DecoderSpec> {
    let softcap = cap(config, "final_logit_softcapping", default_cap)?;
    Ok(DecoderSpec {
        norm: NormSpec::Rms(norm(base)),
        embedding_multiplier: (base.hidden_size as f64).sqrt(),
        logits: LogitsSpec { softcap, ..LogitsSpec::default() },
        ..base.decoder(layers)
    })
}
