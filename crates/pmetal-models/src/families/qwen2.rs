//! Qwen 2 and 2.5, dense: Llama with biases on q, k and v; the later layers may see a window only.

use pmetal_ops::{AttentionSpec, Reach};

use super::{Base, Defaults, sliding_window};
use crate::{AttentionBias, AttentionKind::Heads, DecoderSpec, HeadsSpec, LayerSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(
        config,
        Defaults { num_key_value_heads: Some(32), max_position_embeddings: 32_768, ..Defaults::default() },
    )?;
    let reaches = reaches(config, &base)?;
    let bias = AttentionBias { qkv: true, output: false };
    Ok(base.decoder(base.layers(|index| {
        let heads = base.heads();
        let attention = AttentionSpec { reach: reaches[index], ..heads.attention };
        LayerSpec { attention: Heads(HeadsSpec { attention, bias, ..heads }), ..base.layer() }
    })))
}

/// What each layer's queries see. Files carry the window's keys whether it is used or not: `layer_types` says which layers slide, and without it
/// those from `max_window_layers` on do, where `use_sliding_window` is true.
pub(super) fn reaches(config: &Keys, base: &Base) -> Result<Vec<Reach>> {
    let used = config.boolean("use_sliding_window")?.unwrap_or(false);
    let window = sliding_window(config, 4096)?.filter(|_| used);
    let full_layers = config.whole("max_window_layers")?.unwrap_or(28);
    base.reaches(config, window, |index| index as u64 >= full_layers)
}
