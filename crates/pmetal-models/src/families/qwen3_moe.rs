//! Qwen 3 with experts: Qwen 3 whose layers, all or every so many, have experts.

use pmetal_ops::{AttentionSpec, Reach, RouterSpec};

use super::{Base, Defaults, EXPERTS, router, router_loss, sliding_window};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, ExpertsSpec, GatedSpec, HeadNorm, HeadsSpec, LayerSpec, MlpSpec,
    Names, Result, keys::Keys,
};

const NAMES: Names = Names { parts: &[], files: &[], experts: EXPERTS, sides_traded: false };

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults { num_key_value_heads: Some(4), max_position_embeddings: 32_768, ..Defaults::default() };
    let base = Base::read(config, defaults)?;
    // where windows are used at all, every layer has one
    let used = config.boolean("use_sliding_window")?.unwrap_or(false);
    let reach = sliding_window(config, 4096)?.filter(|_| used).map_or(Reach::All, Reach::Window);
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    let heads = base.heads();
    let attention = Heads(HeadsSpec {
        attention: AttentionSpec { reach, ..heads.attention },
        bias: AttentionBias { qkv: bias, output: bias },
        head_norm: Some(HeadNorm::Rms(base.norm())),
        ..heads
    });
    let router = router(config, &["num_experts", "num_local_experts"], (128, 8))?;
    let renormalise = config.boolean("norm_topk_prob")?.unwrap_or(false);
    let experts = base.experts(RouterSpec { renormalise, ..router });
    let intermediate_size = config.size("moe_intermediate_size")?.unwrap_or(768);
    let experts = ExpertsSpec { expert: GatedSpec { intermediate_size, ..experts.expert }, ..experts };
    let step = config.size("decoder_sparse_step")?.unwrap_or(1);
    let dense = config.wholes("mlp_only_layers")?.unwrap_or_default();
    let layers = base.layers(|index| {
        let has_experts = !dense.contains(&(index as u64)) && (index + 1).is_multiple_of(step);
        let mlp = if has_experts { MlpSpec::Experts(experts.clone()) } else { MlpSpec::Gated(base.gated()) };
        LayerSpec { attention: attention.clone(), mlp, ..base.layer() }
    });
    Ok(DecoderSpec { names: NAMES, router_loss: router_loss(config, 0.001)?, ..base.decoder(layers) })
}
