//! GPT-OSS 20B and 120B: a logit of its own for each head, every other layer seeing a window only, experts with biases and a clamped gate.

use pmetal_ops::{Activation, AttentionSpec, RmsNorm};
use serde_json::{Value, json};

use super::{Base, Defaults, router, router_loss, sliding_window, stacked};
use crate::{
    AttentionBias, AttentionKind::Heads, DecoderSpec, ExpertFiles, ExpertsSpec, GatedSpec, HeadsSpec, LayerSpec,
    MlpSpec, Names, NormSpec, Result, RouterBias, keys::Keys,
};

const NAMES: Names = Names {
    parts: &[("mlp.gate", "mlp.router")],
    files: &[],
    experts: &[
        ExpertFiles::Fused {
            gate_up: "mlp.experts.gate_up_proj",
            down: "mlp.experts.down_proj",
            transposed: true,
            interleaved: true,
        },
        stacked("mlp.experts"),
    ],
    sides_traded: false,
};

/// What files that say nothing of rope leave unsaid.
fn rope() -> Value {
    json!({ "rope_type": "yarn", "factor": 32, "truncate": false, "original_max_position_embeddings": 4096 })
}

pub(crate) fn spec(config: &Keys) -> Result<DecoderSpec> {
    let defaults = Defaults {
        num_key_value_heads: Some(8),
        head_dim: Some(64),
        max_position_embeddings: 131_072,
        rope_theta: 150_000.0,
        eps: ("rms_norm_eps", 1e-5),
        ..Defaults::default()
    };
    let with_rope = config.with("rope_scaling", rope());
    let scaling = config.object("rope_scaling")?.filter(|scaling| !scaling.is_empty());
    let is_silent = scaling.is_none() && config.object("rope_parameters")?.is_none();
    let base = Base::read(&if is_silent { Keys::new(&with_rope) } else { *config }, defaults)?;
    let reaches = base.reaches(config, sliding_window(config, 128)?, |index| index % 2 == 0)?;
    let bias = config.boolean("attention_bias")?.unwrap_or(true);
    let experts = base.experts(router(config, &["num_local_experts", "num_experts"], (128, 4))?);
    let activation = Activation::Clamped {
        alpha: config.positive("swiglu_alpha")?.unwrap_or(1.702) as f32,
        limit: config.positive("swiglu_limit")?.unwrap_or(7.0) as f32,
    };
    let expert = GatedSpec { bias: true, activation, ..experts.expert };
    let experts = ExpertsSpec { expert, router_bias: RouterBias::Logits, ..experts };
    let layers = base.layers(|index| {
        let heads = base.heads();
        let attention = AttentionSpec { reach: reaches[index], ..heads.attention };
        let bias = AttentionBias { qkv: bias, output: bias };
        let attention = Heads(HeadsSpec { attention, bias, sinks: true, ..heads });
        LayerSpec { attention, mlp: MlpSpec::Experts(experts.clone()), ..base.layer() }
    });
    Ok(DecoderSpec {
        norm: NormSpec::Rms(RmsNorm { rounds_first: false, ..base.norm() }),
        names: NAMES,
        router_loss: router_loss(config, 0.001)?,
        ..base.decoder(layers)
    })
}
