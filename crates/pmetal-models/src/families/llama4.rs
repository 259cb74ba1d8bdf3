//! Llama 4 Scout and Maverick, their text part: experts beside a shared one, which read their input times its score; layers that see chunks and
//! turn neighbouring columns, between layers that see all, turn nothing, and whose queries grow with their position.

use pmetal_ops::{AttentionSpec, Reach, RopeLayout, RouterSpec, Scoring};

use super::{Base, Defaults, router, stacked};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, ExpertFiles, ExpertsSpec, GatedSpec, HeadNorm, HeadsSpec,
    LayerSpec, MlpSpec, Names, Result, RopeUse, Temperature, keys::Keys,
};

const NAMES: Names = Names {
    parts: &[
        ("mlp.gate", "feed_forward.router"),
        ("mlp.shared_experts", "feed_forward.shared_expert"),
        ("mlp", "feed_forward"),
    ],
    files: &[],
    experts: &[
        ExpertFiles::Fused {
            gate_up: "feed_forward.experts.gate_up_proj",
            down: "feed_forward.experts.down_proj",
            transposed: true,
            interleaved: false,
        },
        stacked("feed_forward.experts"),
    ],
    sides_traded: true,
};

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults {
        num_attention_heads: Some(40),
        num_key_value_heads: Some(8),
        head_dim: Some(128),
        max_position_embeddings: 131_072,
        rope_theta: 500_000.0,
        eps: ("rms_norm_eps", 1e-5),
        ..Defaults::default()
    };
    let base = Base::read(config, defaults)?;
    let attention = attention(config, &base)?;
    let mlps = mlps(config, &base)?;
    let layers = base.layers(|index| LayerSpec {
        attention: Heads(attention[index].clone()),
        mlp: mlps[index].clone(),
        ..base.layer()
    });
    let layout = RopeLayout { interleaved: true, ..RopeLayout::whole(base.head_dim) };
    Ok(DecoderSpec { ropes: vec![RopeUse { layout, ..base.rope() }], names: NAMES, ..base.decoder(layers) })
}

/// Each layer's attention.
fn attention(config: &Keys, base: &Base) -> Result<Vec<HeadsSpec>> {
    let interval = config.size("no_rope_layer_interval")?.unwrap_or(4);
    let stated = config.wholes("no_rope_layers")?.filter(|list| !list.is_empty());
    if let Some(list) = stated.as_ref().filter(|list| list.len() < base.num_hidden_layers) {
        let reason = format!("has {} entries for {} layers", list.len(), base.num_hidden_layers);
        return Err(config.wrong("no_rope_layers", reason));
    }
    // a 1 stands for a layer with rope
    let turns = |index: usize| match &stated {
        Some(list) => list[index] != 0,
        None => !(index + 1).is_multiple_of(interval),
    };
    let chunk = if config.has("attention_chunk_size") { config.size("attention_chunk_size")? } else { Some(8192) };
    let chunked = base.kinds(config, "layer_types", ["full_attention", "chunked_attention"], turns)?;
    let temperature = Temperature {
        floor: config.positive("floor_scale")?.unwrap_or(8192.0),
        scale: config.number("attn_scale")?.unwrap_or(0.1),
    };
    let tuned = config.switch("attn_temperature_tuning")?.unwrap_or(true);
    let normed = config.boolean("use_qk_norm")?.unwrap_or(true);
    let bias = config.boolean("attention_bias")?.unwrap_or(false);
    let layer = |index: usize| {
        let (turns, heads) = (turns(index), base.heads());
        let reach = chunk.filter(|_| chunked[index]).map_or(Reach::All, Reach::Chunk);
        HeadsSpec {
            attention: AttentionSpec { reach, ..heads.attention },
            bias: AttentionBias { qkv: bias, output: bias },
            rope: heads.rope.filter(|_| turns),
            head_norm: (turns && normed).then_some(HeadNorm::Unit { eps: base.eps }),
            temperature: (!turns && tuned).then_some(temperature),
            ..heads
        }
    };
    Ok((0..base.num_hidden_layers).map(layer).collect())
}

/// Each layer's MLP or experts.
fn mlps(config: &Keys, base: &Base) -> Result<Vec<MlpSpec>> {
    let router = router(config, &["num_local_experts", "num_experts"], (16, 1))?;
    let experts = base.experts(RouterSpec { scoring: Scoring::Sigmoid, renormalise: false, ..router });
    let experts = ExpertsSpec { scale_input: true, shared: Some(base.gated()), ..experts };
    let intermediate_size = config.size("intermediate_size_mlp")?.unwrap_or(16_384);
    let dense = GatedSpec { intermediate_size, ..base.gated() };
    let step = config.size("interleave_moe_layer_step")?.unwrap_or(1);
    let stated = config.wholes("moe_layers")?;
    let mlp = |index: usize| {
        let has_experts = match &stated {
            Some(list) => list.contains(&(index as u64)),
            None => (index + 1).is_multiple_of(step),
        };
        if has_experts { MlpSpec::Experts(experts.clone()) } else { MlpSpec::Gated(dense.clone()) }
    };
    Ok((0..base.num_hidden_layers).map(mlp).collect())
}
