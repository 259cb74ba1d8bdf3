//! Mixtral 8x7B and 8x22B: Mistral with experts, weighted by the softmax over those that were picked.

use pmetal_ops::{AttentionSpec, Reach};

use super::{Base, Defaults, FUSED, router, router_loss, stacked};
use crate::{AttentionKind::Heads, DecoderSpec, ExpertFiles, HeadsSpec, LayerSpec, MlpSpec, Names, Result, keys::Keys};

const NAMES: Names = Names {
    parts: &[],
    files: &[("mlp.gate", "block_sparse_moe.gate")],
    experts: &[
        ExpertFiles::Each { module: "block_sparse_moe.experts", gate: "w1", up: "w3", down: "w2" },
        FUSED,
        stacked("block_sparse_moe.experts"),
    ],
    sides_traded: false,
};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults {
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        rope_theta: 1e6,
        eps: ("rms_norm_eps", 1e-5),
        ..Defaults::default()
    };
    let base = Base::read(config, defaults)?;
    let reach = config.size("sliding_window")?.map_or(Reach::All, Reach::Window);
    let experts = base.experts(router(config, &["num_local_experts", "num_experts"], (8, 2))?);
    let layers = base.layers(|_| {
        let heads = base.heads();
        let attention = AttentionSpec { reach, ..heads.attention };
        let attention = Heads(HeadsSpec { attention, ..heads });
        LayerSpec { attention, mlp: MlpSpec::Experts(experts.clone()), ..base.layer() }
    });
    Ok(DecoderSpec { names: NAMES, router_loss: router_loss(config, 0.001)?, ..base.decoder(layers) })
}
