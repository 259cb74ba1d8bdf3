//! Gemma 3, its text part: Gemma 2 with normalised heads of q and k in place of the cap on scores, and a rope of their own for the layers that
//! see a window only.

use pmetal_ops::{AttentionSpec, Reach};

use super::{
    Base, Defaults,
    gemma2::{decoder, defaults, heads, norm},
    sliding_window,
};
use crate::{AttentionKind::Heads, DecoderSpec, HeadNorm, HeadsSpec, LayerSpec, NormPlaces, Result, keys::Keys};

/// The rope of layers that see all, that of the others.
const GLOBAL: usize = 0;
const LOCAL: usize = 1;

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    if config.boolean("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(config.refuse("use_bidirectional_attention", "is not supported; choose another model"));
    }
    let defaults = Defaults {
        vocab_size: Some(262_208),
        max_position_embeddings: 131_072,
        rope_theta: 1e6,
        rope_of: Some("full_attention"),
        ..defaults()
    };
    let base = Base::read(config, defaults)?;
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(6);
    let reaches = base.reaches(config, sliding_window(config, 4096)?, |index| (index + 1) % pattern != 0)?;
    let heads = HeadsSpec { head_norm: Some(HeadNorm::Rms(norm(&base))), ..heads(config, &base)? };
    let layers = base.layers(|index| {
        let rope = Some(if reaches[index] == Reach::All { GLOBAL } else { LOCAL });
        let attention = AttentionSpec { reach: reaches[index], ..heads.attention };
        let attention = Heads(HeadsSpec { attention, rope, ..heads.clone() });
        LayerSpec { attention, norms: NormPlaces::Around, ..base.layer() }
    });
    let theta = config.positive("rope_local_base_freq")?.unwrap_or(10_000.0);
    let ropes = vec![base.rope(), base.other_rope(config, "sliding_attention", theta)?];
    Ok(DecoderSpec { ropes, ..decoder(config, &base, layers, None)? })
}
