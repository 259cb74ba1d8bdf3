//! Command R7B: Command R whose layers see a window only, but for every fourth, which sees all and turns nothing.

use pmetal_ops::{AttentionSpec, Reach};

use super::{
    Base,
    cohere::{decoder, defaults, heads, layer},
    sliding_window,
};
use crate::{DecoderSpec, HeadsSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(config, defaults())?;
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(4);
    let reaches = base.reaches(config, sliding_window(config, 4096)?, |index| (index + 1) % pattern != 0)?;
    let heads = heads(config, &base)?;
    let layers = base.layers(|index| {
        let (reach, heads) = (reaches[index], heads.clone());
        let rope = heads.rope.filter(|_| reach != Reach::All);
        let attention = AttentionSpec { reach, ..heads.attention };
        layer(&base, HeadsSpec { attention, rope, ..heads })
    });
    decoder(config, &base, layers)
}
