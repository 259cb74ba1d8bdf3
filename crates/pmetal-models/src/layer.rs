use std::sync::Arc;

use candle_core::{DType, Shape, Tensor};
use pmetal_ops::{
    Activation, AttentionSpec, Fate, LinearGroup, LinearMember, Policy, Reach, RmsNorm, RopeTable, Rows, Saved, Value,
    Weight, add_rms_norm, attention,
    autograd::{last, saved},
    gated_activation, rms_norm_beside, rms_norm_rope, rope,
};

use crate::{
    DecoderSpec, Error, KvCache, Result,
    checkpointing::residual,
    names::{BLOCK_NORMS, HEAD_NORMS, LAYERS, LinearShape, linear_groups},
    one_token::{LayerRows, Projections, lying},
};

/// What a pass through the layers shares.
#[derive(Clone)]
pub(crate) struct Pass {
    /// Angles of the tokens.
    pub(crate) table: RopeTable,
    /// Where rows lie among queries and keys.
    pub(crate) rows: Rows,
    /// The seed of dropout.
    pub(crate) noise: Option<u64>,
}

/// A norm of the residual stream, and the columns that its reader wants free behind each row.
#[derive(Clone)]
pub(crate) struct Norm {
    pub(crate) weight: Weight,
    pub(crate) norm: RmsNorm,
    pub(crate) spare: usize,
}

impl Norm {
    /// `stream` and its norm.
    pub(crate) fn of(&self, stream: &Value) -> Result<(Value, Value)> {
        Ok(rms_norm_beside(stream, &self.weight.value()?, self.norm, self.spare)?)
    }

    /// `x + stream` and its norm.
    pub(crate) fn of_sum(&self, x: &Value, stream: &Value) -> Result<(Value, Value)> {
        Ok(add_rms_norm(x, stream, &self.weight.value()?, self.norm, self.spare)?)
    }
}

/// Where a pass leaves its keys and values, and the tokens of each row.
pub(crate) type CacheUse<'a> = Option<(&'a KvCache, &'a [usize])>;

/// One layer: attention and a gated MLP, each behind a norm, on a residual stream.
#[derive(Clone)]
pub(crate) struct Layer {
    index: usize,
    attention: AttentionSpec,
    norm: RmsNorm,
    /// Before attention, before the MLP.
    block_norms: [Weight; 2],
    /// Of the heads of q and k.
    head_norms: Option<[Weight; 2]>,
    qkv: LinearGroup,
    output: LinearGroup,
    gate_up: LinearGroup,
    down: LinearGroup,
    /// The names of the linear layers' modules, in the order of the groups.
    modules: Vec<String>,
}

impl Layer {
    /// The layer of the weights that `get` returns by name and shape.
    pub(crate) fn new(
        spec: &DecoderSpec,
        index: usize,
        get: &mut impl FnMut(String, Shape) -> Result<Weight>,
    ) -> Result<Self> {
        let mut modules = Vec::with_capacity(7);
        let mut group = |shapes: Vec<LinearShape>| {
            let member = |linear: LinearShape| {
                let module = format!("{LAYERS}{index}.{}", linear.module);
                let weight = get(format!("{module}.weight"), (linear.outputs, linear.inputs).into())?.packed()?;
                let bias = if linear.bias { Some(get(format!("{module}.bias"), linear.outputs.into())?) } else { None };
                modules.push(module);
                Ok(LinearMember { weight, bias, adapter: None })
            };
            Ok::<_, Error>(LinearGroup::new(shapes.into_iter().map(member).collect::<Result<_>>()?)?)
        };
        let [qkv, output, gate_up, down] = linear_groups(spec);
        let (qkv, output, gate_up, down) = (group(qkv)?, group(output)?, group(gate_up)?, group(down)?);
        let mut pair = |[a, b]: [&str; 2], width: usize| {
            let mut norm = |name: &str| get(format!("{LAYERS}{index}.{name}.weight"), width.into());
            Ok::<_, Error>([norm(a)?, norm(b)?])
        };
        let block_norms = pair(BLOCK_NORMS, spec.hidden_size)?;
        let head_norms = if spec.qk_norm { Some(pair(HEAD_NORMS, spec.head_dim)?) } else { None };
        let attention = AttentionSpec {
            heads: spec.num_attention_heads,
            kv_heads: spec.num_key_value_heads,
            head_dim: spec.head_dim,
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
            reach: Reach::All,
            softcap: None,
        };
        let norm = RmsNorm::new(spec.rms_norm_eps);
        Ok(Self { index, attention, norm, block_norms, head_norms, qkv, output, gate_up, down, modules })
    }

    /// The norm that `stream` meets before this layer.
    pub(crate) fn input_norm(&self) -> Norm {
        Norm { weight: self.block_norms[0].clone(), norm: self.norm, spare: self.qkv.spare_columns() }
    }

    /// The norm before the MLP.
    fn middle_norm(&self) -> Norm {
        Norm { weight: self.block_norms[1].clone(), norm: self.norm, spare: self.gate_up.spare_columns() }
    }

    /// From the residual stream and its norm (both `[tokens, hidden]`) to the next layer's, whose norm is `next`.
    pub(crate) fn forward(
        &self,
        stream: &Value,
        normed: &Value,
        next: &Norm,
        pass: &Pass,
        cache: CacheUse,
    ) -> Result<(Value, Value)> {
        let (stream, normed) = self.middle_norm().of_sum(&self.attend(normed, pass, cache)?, stream)?;
        next.of_sum(&self.mlp(&normed, pass)?, &stream)
    }

    /// [`Layer::forward`] that keeps what `policy` says and runs again in backward; no gradient flows through `normed`, nor through the norm that
    /// is returned.
    pub(crate) fn checkpointed(
        self: &Arc<Self>,
        policy: Policy,
        stream: &Value,
        normed: Value,
        next: Norm,
        pass: &Pass,
    ) -> Result<(Value, Value)> {
        let (layer, pass) = (self.clone(), pass.clone());
        let (first, middle) = (self.input_norm(), self.middle_norm());
        if policy.fate(Saved::Middle) == Fate::Recompute {
            return residual(policy, [first, next], stream, normed, move |stream, normed| {
                let attended = layer.attend(normed, &pass, None)?;
                let (stream, normed) = layer.middle_norm().of_sum(&attended, &stream)?;
                Ok([stream, layer.mlp(&normed, &pass)?])
            });
        }
        let (again, passing) = (layer.clone(), pass.clone());
        let (stream, normed) = residual(policy, [first, middle.clone()], stream, normed, move |stream, normed| {
            Ok([stream, again.attend(normed, &passing, None)?])
        })?;
        let policy = policy.with(Saved::Input, policy.fate(Saved::Middle));
        residual(policy, [middle, next], &stream, normed, move |stream, normed| Ok([stream, layer.mlp(normed, &pass)?]))
    }

    fn mlp(&self, x: &Value, pass: &Pass) -> Result<Value> {
        let [gate, up] = take(saved(Saved::Gates, || self.gate_up.forward(x, pass.noise))?)?;
        let gated = gated_activation(Activation::Silu, &gate, &up, self.down.spare_columns())?;
        let [y] = take(last(|| self.down.forward(&gated, pass.noise))?)?;
        Ok(y)
    }

    fn attend(&self, x: &Value, pass: &Pass, cache: CacheUse) -> Result<Value> {
        let [q, k, v] = take(saved(Saved::Projections, || self.qkv.forward(x, pass.noise))?)?;
        let (q_norm, k_norm) = match &self.head_norms {
            Some([q, k]) => (Some(q), Some(k)),
            None => (None, None),
        };
        let q = self.turned(&q, q_norm, &pass.table)?;
        let k = self.turned(&k, k_norm, &pass.table)?;
        let (k, v) = match cache {
            Some((cache, q_lens)) => {
                let (keys, values) = cache.extend(self.index, k.tensor(), v.tensor(), q_lens)?;
                (Value::constant(keys), Value::constant(values))
            }
            None => (k, v),
        };
        let spare = self.output.spare_columns();
        let y = saved(Saved::Attention, || attention(&q, &k, &v, None, &pass.rows, self.attention, spare))?;
        let [y] = take(saved(Saved::Middle, || self.output.forward(&y, pass.noise))?)?;
        Ok(y)
    }

    /// `[tokens, heads * head_dim]`, each head normalised where there is a norm, and turned.
    fn turned(&self, x: &Value, norm: Option<&Weight>, table: &RopeTable) -> Result<Value> {
        Ok(match norm {
            Some(norm) => rms_norm_rope(x, &norm.value()?, self.norm, table)?,
            None => rope(x, table)?,
        })
    }

    /// Visits the linear layers under their modules' names, to change them.
    pub(crate) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        let mut modules = self.modules.iter();
        for group in [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down] {
            group.change(|members| {
                members.iter_mut().zip(&mut modules).for_each(|(member, module)| f(module, member))
            })?;
        }
        Ok(())
    }

    /// Its heads.
    pub(crate) fn attention(&self) -> &AttentionSpec {
        &self.attention
    }

    /// The layer for one token at a time, with its places in the cache; none where a weight does not lie on the device in `dtype`, or has an
    /// adapter.
    pub(crate) fn rows(&self, dtype: DType, cache: (Tensor, Tensor)) -> Result<Option<LayerRows>> {
        let both = |[a, b]: &[Weight; 2]| Some([lying(a, dtype)?, lying(b, dtype)?]);
        let groups = [&self.qkv, &self.output, &self.gate_up, &self.down].map(|group| Projections::of(group, dtype));
        let [qkv, output, gate_up, down] = groups;
        let (Some(qkv), Some(output), Some(gate_up), Some(down)) = (qkv?, output?, gate_up?, down?) else {
            return Ok(None);
        };
        let (Some(block_norms), head_norms) = (both(&self.block_norms), self.head_norms.as_ref().map(both)) else {
            return Ok(None);
        };
        let head_norms = match head_norms {
            Some(None) => return Ok(None),
            Some(norms) => norms,
            None => None,
        };
        Ok(Some(LayerRows { block_norms, head_norms, qkv, output, gate_up, down, cache }))
    }

    /// Every weight with its name, in the order of [`crate::tensors_of`].
    pub(crate) fn named_weights(&self) -> Vec<(String, Weight)> {
        let groups = [&self.qkv, &self.output, &self.gate_up, &self.down];
        let mut weights = Vec::new();
        for (module, member) in self.modules.iter().zip(groups.into_iter().flat_map(LinearGroup::members)) {
            weights.push((format!("{module}.weight"), member.weight.clone()));
            weights.extend(member.bias.iter().map(|bias| (format!("{module}.bias"), bias.clone())));
        }
        let head_norms = HEAD_NORMS.iter().zip(self.head_norms.iter().flatten());
        for (name, norm) in BLOCK_NORMS.iter().zip(&self.block_norms).chain(head_norms) {
            weights.push((format!("{LAYERS}{}.{name}.weight", self.index), norm.clone()));
        }
        weights
    }
}

/// The results of a group of `N` projections.
pub(crate) fn take<const N: usize>(values: Vec<Value>) -> Result<[Value; N]> {
    let found = values.len();
    values.try_into().map_err(|_| Error::Input { reason: format!("a group of {N} projections returned {found}") })
}
