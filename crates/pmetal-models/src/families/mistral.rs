//! Mistral 7B, Nemo, Small: Llama whose layers may see a window only.

use pmetal_ops::{AttentionSpec, Reach};

use super::{Base, Defaults, sliding_window};
use crate::{AttentionKind::Heads, DecoderSpec, HeadsSpec, LayerSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults { num_key_value_heads: Some(8), max_position_embeddings: 131_072, ..Defaults::default() };
    let base = Base::read(config, defaults)?;
    let reach = sliding_window(config, 4096)?.map_or(Reach::All, Reach::Window);
    Ok(base.decoder(base.layers(|_| {
        let heads = base.heads();
        let attention = AttentionSpec { reach, ..heads.attention };
        LayerSpec { attention: Heads(HeadsSpec { attention, ..heads }), ..base.layer() }
    })))
}
