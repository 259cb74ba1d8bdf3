//! Phi 3, 3.5, 4 and 4-mini: Llama with q, k and v in one matrix and gate and up in another; ropes that change with a row's length.

use pmetal_ops::{AttentionSpec, Reach};

use super::{Base, Defaults};
use crate::{AttentionKind::Heads, DecoderSpec, GatedSpec, HeadsSpec, LayerSpec, MlpSpec, Result, keys::Keys};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults {
        max_position_embeddings: 4096,
        eps: ("rms_norm_eps", 1e-5),
        partial_rotary: true,
        ..Defaults::default()
    };
    let base = Base::read(config, defaults)?;
    let reach = config.size("sliding_window")?.map_or(Reach::All, Reach::Window);
    Ok(base.decoder(base.layers(|_| {
        let heads = base.heads();
        let attention = AttentionSpec { reach, ..heads.attention };
        LayerSpec {
            attention: Heads(HeadsSpec { attention, fused: true, ..heads }),
            mlp: MlpSpec::Gated(GatedSpec { fused: true, ..base.gated() }),
            ..base.layer()
        }
    })))
}
