//! DeepSeek V3, V3.1 and R1: keys and values that are projections of one short row, experts picked in groups beside a shared one.

use pmetal_ops::{Groups, RmsNorm, RopeLayout, RouterSpec, Scoring};

use super::{Base, Defaults, EXPERTS, router};
use crate::{
    AttentionKind::Latent, DecoderSpec, ExpertsSpec, GatedSpec, LatentSpec, LayerSpec, MlpSpec, Names, Result, RopeUse,
    RouterBias, keys::Keys,
};

const NAMES: Names = Names { parts: &[], files: &[], experts: EXPERTS, sides_traded: false };
/// The ropes of q, of the shared columns of k.
const Q_ROPE: usize = 0;
const K_ROPE: usize = 1;

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let base = base(config, 4096)?;
    let interleaved = config.boolean("rope_interleave")?.unwrap_or(true);
    decoder(config, &base, latent(config, &base)?, interleaved)
}

/// What the configurations of this family and the next share.
pub(super) fn base(config: &Keys, max_position_embeddings: usize) -> Result<Base> {
    let defaults = Defaults {
        num_key_value_heads: Some(128),
        max_position_embeddings,
        head_dim_key: "qk_rope_head_dim",
        head_dim: Some(64),
        ..Defaults::default()
    };
    let base = Base::read(config, defaults)?;
    if base.rope.depends_on_length() {
        return Err(config.refuse("rope_scaling", "depends on the length, which latent attention does not support"));
    }
    Ok(base)
}

pub(super) fn latent(config: &Keys, base: &Base) -> Result<LatentSpec> {
    let qk_nope_head_dim = config.size("qk_nope_head_dim")?.unwrap_or(128);
    let width = (qk_nope_head_dim + base.head_dim) as f32;
    let mscale = base.rope.softmax_factor as f32;
    Ok(LatentSpec {
        heads: base.heads,
        q_lora_rank: if config.has("q_lora_rank") { config.size("q_lora_rank")? } else { Some(1536) },
        kv_lora_rank: config.size("kv_lora_rank")?.unwrap_or(512),
        qk_nope_head_dim,
        qk_rope_head_dim: base.head_dim,
        v_head_dim: config.size("v_head_dim")?.unwrap_or(128),
        scale: mscale / width.sqrt(),
        bias: config.boolean("attention_bias")?.unwrap_or(false),
        // whatever `rms_norm_eps` is
        norm: RmsNorm::new(1e-6),
        ropes: [Q_ROPE, K_ROPE],
        indexer: None,
    })
}

/// The decoder whose layers have this attention; the first of them have no experts.
pub(super) fn decoder(config: &Keys, base: &Base, latent: LatentSpec, interleaved: bool) -> Result<DecoderSpec> {
    let experts = experts(config, base)?;
    let dense = config.whole("first_k_dense_replace")?.unwrap_or(3);
    let has_experts = base.kinds(config, "mlp_layer_types", ["dense", "sparse"], |index| index as u64 >= dense)?;
    let width = latent.qk_head_dim();
    let layers = base.layers(|index| LayerSpec {
        attention: Latent(latent.clone()),
        mlp: if has_experts[index] { MlpSpec::Experts(experts.clone()) } else { MlpSpec::Gated(base.gated()) },
        ..base.layer()
    });
    let turned =
        |head_dim, start| RopeUse { rope: base.rope.clone(), layout: RopeLayout { head_dim, start, interleaved } };
    let ropes = vec![turned(width, width - base.head_dim), turned(base.head_dim, 0)];
    Ok(DecoderSpec { ropes, names: NAMES, ..base.decoder(layers) })
}

fn experts(config: &Keys, base: &Base) -> Result<ExpertsSpec> {
    let router = router(config, &["n_routed_experts", "num_local_experts", "num_experts"], (256, 8))?;
    let [count, kept] = [config.size("n_group")?.unwrap_or(8), config.size("topk_group")?.unwrap_or(4)];
    if !router.experts.is_multiple_of(count) || kept > count || router.experts / count * kept < router.top_k {
        let reason = format!("{count} groups, {kept} of them for {} of {} experts", router.top_k, router.experts);
        return Err(config.wrong("n_group", reason));
    }
    let experts = base.experts(RouterSpec {
        scoring: Scoring::Sigmoid,
        renormalise: config.boolean("norm_topk_prob")?.unwrap_or(true),
        groups: Some(Groups { count, kept }),
        scale: config.positive("routed_scaling_factor")?.unwrap_or(2.5),
        ..router
    });
    let intermediate_size = config.size("moe_intermediate_size")?.unwrap_or(2048);
    let shared = config.whole("n_shared_experts")?.unwrap_or(1) as usize;
    Ok(ExpertsSpec {
        router_bias: RouterBias::Selection,
        expert: GatedSpec { intermediate_size, ..experts.expert },
        shared: (shared > 0).then(|| GatedSpec { intermediate_size: intermediate_size * shared, ..base.gated() }),
        ..experts
    })
}
