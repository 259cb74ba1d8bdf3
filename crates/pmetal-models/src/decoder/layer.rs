//! One layer: attention and an MLP, each behind a norm, on a residual stream.

use std::sync::Arc;

use candle_core::{DType, Shape, Tensor};
use pmetal_ops::{Fate, LinearMember, Policy, Saved, Value, Weight, scaled};

use super::{
    checkpointing::residual,
    experts::Experts,
    gated::Gated,
    heads::Heads,
    latent::Latent,
    norm::{Norm, sum},
    one_token::LayerRows,
    parts::Parts,
    pass::{CacheUse, Pass},
};
use crate::{AttentionKind, DecoderSpec, LayerSpec, MlpSpec, NormPlaces, Result};

/// One layer.
#[derive(Clone)]
pub(super) struct Layer {
    attention: Attention,
    mlp: Mlp,
    input_norm: Norm,
    /// Before the MLP, where that does not read what attention reads.
    middle_norm: Option<Norm>,
    /// Behind attention and behind the MLP.
    norms_behind: Option<[Norm; 2]>,
    residual_multiplier: f64,
}

#[derive(Clone)]
enum Attention {
    Heads(Box<Heads>),
    Latent(Box<Latent>),
}

#[derive(Clone)]
enum Mlp {
    Gated(Box<Gated>),
    Experts(Box<Experts>),
}

/// What a layer hands on: the stream, its norm before the next reader, and the products of its router, where it has one.
pub(super) type Passed = (Value, Value, Option<Value>);

impl Layer {
    /// The layer of the weights that `get` returns by name and shape.
    pub(super) fn new(
        spec: &DecoderSpec,
        index: usize,
        get: &mut dyn FnMut(&str, Shape) -> Result<Weight>,
    ) -> Result<Self> {
        let LayerSpec { attention, mlp, norms, residual_multiplier } = &spec.layers[index];
        let (hidden, mut parts) = (spec.hidden_size, Parts::new(&spec.names, index, get));
        let attention = match attention {
            AttentionKind::Heads(heads) => Attention::Heads(Box::new(Heads::new(heads, hidden, index, &mut parts)?)),
            AttentionKind::Latent(latent) => {
                Attention::Latent(Box::new(Latent::new(latent, hidden, index, &mut parts)?))
            }
        };
        let mlp = match mlp {
            MlpSpec::Gated(gated) => Mlp::Gated(Box::new(Gated::new(gated, hidden, "mlp", &mut parts)?)),
            MlpSpec::Experts(experts) => Mlp::Experts(Box::new(Experts::new(experts, hidden, &mut parts)?)),
        };
        let mut norm = |part: &str| {
            let weight = parts.weight(&format!("{part}.weight"), hidden)?;
            Ok::<_, crate::Error>(Norm { weight, spec: spec.norm, spare: 0 })
        };
        let input_norm = norm("input_layernorm")?;
        let (middle_norm, norms_behind) = match norms {
            NormPlaces::Before => (Some(norm("post_attention_layernorm")?), None),
            NormPlaces::Around => {
                let behind_attention = norm("post_attention_layernorm")?;
                let middle = norm("pre_feedforward_layernorm")?;
                (Some(middle), Some([behind_attention, norm("post_feedforward_layernorm")?]))
            }
            NormPlaces::Shared => (None, None),
        };
        let residual_multiplier = *residual_multiplier;
        Ok(Self { attention, mlp, input_norm, middle_norm, norms_behind, residual_multiplier })
    }

    /// The norm that the stream meets before this layer.
    pub(super) fn input_norm(&self) -> Norm {
        self.input_norm.for_reader(match &self.attention {
            Attention::Heads(heads) => heads.spare_columns(),
            Attention::Latent(latent) => latent.spare_columns(),
        })
    }

    /// From the residual stream and its norm (both `[tokens, hidden]`) to the next layer's, whose norm is `next`.
    pub(super) fn forward(
        &self,
        stream: &Value,
        normed: &Value,
        next: &Norm,
        pass: &Pass,
        cache: CacheUse,
    ) -> Result<Passed> {
        let attended = self.attend(normed, pass, cache)?;
        let (added, stream, router) = match self.middle_norm() {
            Some(middle) => {
                let (stream, normed) = middle.of_sum(&attended, stream)?;
                let (added, router) = self.think(&normed, pass)?;
                (added, stream, router)
            }
            None => {
                let (added, router) = self.think(normed, pass)?;
                (sum(&attended, &added)?, stream.clone(), router)
            }
        };
        let (stream, normed) = next.of_sum(&added, &stream)?;
        Ok((stream, normed, router))
    }

    /// [`Layer::forward`] that keeps what `policy` says and runs again in backward; no gradient flows through `normed`, nor through the norm that
    /// is returned.
    pub(super) fn checkpointed(
        self: &Arc<Self>,
        policy: Policy,
        stream: &Value,
        normed: Value,
        next: Norm,
        pass: &Pass,
    ) -> Result<Passed> {
        let (layer, pass, first) = (self.clone(), pass.clone(), self.input_norm());
        let Some(middle) = self.middle_norm() else {
            let policy = policy.with(Saved::Middle, Fate::Recompute);
            return residual(policy, [first, next], stream, normed, move |stream, normed| {
                let attended = layer.attend(normed, &pass, None)?;
                let (added, router) = layer.think(normed, &pass)?;
                Ok((stream, sum(&attended, &added)?, router))
            });
        };
        if policy.fate(Saved::Middle) == Fate::Recompute {
            return residual(policy, [first, next], stream, normed, move |stream, normed| {
                let (stream, normed) = middle.of_sum(&layer.attend(normed, &pass, None)?, &stream)?;
                let (added, router) = layer.think(&normed, &pass)?;
                Ok((stream, added, router))
            });
        }
        let (again, passing) = (layer.clone(), pass.clone());
        let (stream, normed, _) = residual(policy, [first, middle.clone()], stream, normed, move |stream, normed| {
            Ok((stream, again.attend(normed, &passing, None)?, None))
        })?;
        let policy = policy.with(Saved::Input, policy.fate(Saved::Middle));
        residual(policy, [middle, next], &stream, normed, move |stream, normed| {
            let (added, router) = layer.think(normed, &pass)?;
            Ok((stream, added, router))
        })
    }

    /// The norm before the MLP.
    fn middle_norm(&self) -> Option<Norm> {
        let spare = match &self.mlp {
            Mlp::Gated(gated) => gated.spare_columns(),
            Mlp::Experts(_) => 0,
        };
        self.middle_norm.as_ref().map(|norm| norm.for_reader(spare))
    }

    /// What attention adds to the stream.
    fn attend(&self, normed: &Value, pass: &Pass, cache: CacheUse) -> Result<Value> {
        let ends = self.adds_as_is();
        let attended = match &self.attention {
            Attention::Heads(heads) => heads.forward(normed, pass, cache, ends)?,
            Attention::Latent(latent) => latent.forward(normed, pass, cache, ends)?,
        };
        self.added(attended, 0)
    }

    /// What the MLP adds to the stream, and the products of its router.
    fn think(&self, normed: &Value, pass: &Pass) -> Result<(Value, Option<Value>)> {
        let (y, router) = match &self.mlp {
            Mlp::Gated(gated) => (gated.forward(normed, pass, self.adds_as_is())?, None),
            Mlp::Experts(experts) => {
                let [y, router] = experts.forward(normed, pass)?;
                (y, Some(router))
            }
        };
        Ok((self.added(y, 1)?, router))
    }

    /// Whether attention and MLP add to the stream just what they return.
    fn adds_as_is(&self) -> bool {
        self.norms_behind.is_none() && self.residual_multiplier == 1.0 && self.middle_norm.is_some()
    }

    fn added(&self, y: Value, which: usize) -> Result<Value> {
        let y = match &self.norms_behind {
            Some(norms) => norms[which].alone(&y)?,
            None => y,
        };
        Ok(if self.residual_multiplier == 1.0 { y } else { scaled(&y, self.residual_multiplier)? })
    }

    /// Visits the linear layers under their modules' names, to change them.
    pub(super) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        match &mut self.attention {
            Attention::Heads(heads) => heads.for_each_linear(f)?,
            Attention::Latent(latent) => latent.for_each_linear(f)?,
        }
        match &mut self.mlp {
            Mlp::Gated(gated) => gated.for_each_linear(f),
            Mlp::Experts(experts) => experts.for_each_linear(f),
        }
    }

    /// The layer for one token at a time, with its places in the cache; none where a weight does not lie on the device in `dtype`, or has an
    /// adapter.
    pub(super) fn rows(&self, dtype: DType, cache: [Tensor; 2]) -> Result<Option<LayerRows>> {
        let (Some(middle), Attention::Heads(heads), Mlp::Gated(mlp)) = (&self.middle_norm, &self.attention, &self.mlp)
        else {
            return Ok(None);
        };
        let Some(heads) = heads.rows(dtype)? else { return Ok(None) };
        let norms = [&self.input_norm, middle].map(|norm| &norm.weight.weight);
        LayerRows::new(norms, heads, mlp.groups(), cache, dtype)
    }

    /// Adds every weight with its name.
    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        match &self.attention {
            Attention::Heads(heads) => heads.named_weights(to),
            Attention::Latent(latent) => latent.named_weights(to),
        }
        match &self.mlp {
            Mlp::Gated(gated) => gated.named_weights(to),
            Mlp::Experts(experts) => experts.named_weights(to),
        }
        let behind = self.norms_behind.iter().flatten();
        let norms = std::iter::once(&self.input_norm).chain(&self.middle_norm).chain(behind);
        to.extend(norms.map(|norm| norm.weight.pair()));
    }
}
