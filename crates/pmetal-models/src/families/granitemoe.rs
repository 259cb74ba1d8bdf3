//! Granite 3.0 and 3.1 with experts, weighted by the softmax over those that were picked.

use super::{Base, Defaults, granite::decoder, router, router_loss, stacked};
use crate::{DecoderSpec, ExpertFiles, MlpSpec, Names, Result, keys::Keys};

const NAMES: Names = Names {
    parts: &[("mlp.gate", "block_sparse_moe.router"), ("mlp", "block_sparse_moe")],
    files: &[("block_sparse_moe.router", "block_sparse_moe.router.layer")],
    experts: &[
        fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        fused("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        stacked("block_sparse_moe.experts"),
    ],
    sides_traded: false,
};

const fn fused(gate_up: &'static str, down: &'static str) -> ExpertFiles {
    ExpertFiles::Fused { gate_up, down, transposed: false, interleaved: false }
}

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = Base::read(config, Defaults::default())?;
    let experts = base.experts(router(config, &["num_local_experts"], (8, 2))?);
    let decoder = decoder(config, &base, &MlpSpec::Experts(experts))?;
    Ok(DecoderSpec { names: NAMES, router_loss: router_loss(config, 0.001)?, ..decoder })
}
