use candle_core::Shape;
use pmetal_ops::{
    Activation, AttentionSpec, LinearGroup, LinearMember, RopeTable, Rows, Value, Weight, add_rms_norm, attention,
    gated_activation, rms_norm_rope, rope,
};

use crate::{
    DecoderSpec, Error, KvCache, Result,
    names::{BLOCK_NORMS, HEAD_NORMS, LAYERS, LinearShape, linear_groups},
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

/// Where a pass leaves its keys and values, and the tokens of each row.
pub(crate) type CacheUse<'a> = Option<(&'a KvCache, &'a [usize])>;

/// One layer: attention and a gated MLP, each behind a norm, on a residual stream.
#[derive(Clone)]
pub(crate) struct Layer {
    index: usize,
    attention: AttentionSpec,
    eps: f64,
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
            Ok::<_, Error>(LinearGroup { members: shapes.into_iter().map(member).collect::<Result<_>>()? })
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
        };
        let eps = spec.rms_norm_eps;
        Ok(Self { index, attention, eps, block_norms, head_norms, qkv, output, gate_up, down, modules })
    }

    /// The norm that `stream` meets before this layer.
    pub(crate) fn input_norm(&self) -> &Weight {
        &self.block_norms[0]
    }

    /// From the residual stream and its norm (both `[tokens, hidden]`) to the next layer's, whose norm is `next_norm`.
    pub(crate) fn forward(
        &self,
        stream: &Value,
        normed: &Value,
        next_norm: &Weight,
        pass: &Pass,
        cache: CacheUse,
    ) -> Result<(Value, Value)> {
        let attended = self.attend(normed, pass, cache)?;
        let (stream, normed) = add_rms_norm(&attended, stream, &self.block_norms[1].value()?, self.eps)?;
        let [gate, up] = take(self.gate_up.forward(&normed, pass.noise)?)?;
        let gated = gated_activation(Activation::Silu, &gate, &up)?;
        let [mlp] = take(self.down.forward(&gated, pass.noise)?)?;
        Ok(add_rms_norm(&mlp, &stream, &next_norm.value()?, self.eps)?)
    }

    fn attend(&self, x: &Value, pass: &Pass, cache: CacheUse) -> Result<Value> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.attention;
        let tokens = x.tensor().dim(0)?;
        let [q, k, v] = take(self.qkv.forward(x, pass.noise)?)?;
        let (q_norm, k_norm) = match &self.head_norms {
            Some([q, k]) => (Some(q), Some(k)),
            None => (None, None),
        };
        let q = self.turned(&q, heads, q_norm, &pass.table)?;
        let k = self.turned(&k, kv_heads, k_norm, &pass.table)?;
        let v = v.reshape((tokens, kv_heads, head_dim))?;
        let (k, v) = match cache {
            Some((cache, q_lens)) => {
                let (keys, values) = cache.extend(self.index, k.tensor(), v.tensor(), q_lens)?;
                (Value::constant(keys), Value::constant(values))
            }
            None => (k, v),
        };
        let y = attention(&q, &k, &v, &pass.rows, self.attention)?.reshape((tokens, heads * head_dim))?;
        let [y] = take(self.output.forward(&y, pass.noise)?)?;
        Ok(y)
    }

    /// `[tokens, heads * head_dim]` as `[tokens, heads, head_dim]`, each head normalised where there is a norm, and turned.
    fn turned(&self, x: &Value, heads: usize, norm: Option<&Weight>, table: &RopeTable) -> Result<Value> {
        let x = x.reshape((x.tensor().dim(0)?, heads, self.attention.head_dim))?;
        Ok(match norm {
            Some(norm) => rms_norm_rope(&x, &norm.value()?, self.eps, table)?,
            None => rope(&x, table)?,
        })
    }

    /// The linear layers under their modules' names.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = (&str, &mut LinearMember)> {
        let groups = [&mut self.qkv, &mut self.output, &mut self.gate_up, &mut self.down];
        self.modules.iter().map(String::as_str).zip(groups.into_iter().flat_map(|group| &mut group.members))
    }

    /// Every weight with its name, in the order of [`crate::tensors_of`].
    pub(crate) fn named_weights(&self) -> Vec<(String, Weight)> {
        let groups = [&self.qkv, &self.output, &self.gate_up, &self.down];
        let mut weights = Vec::new();
        for (module, member) in self.modules.iter().zip(groups.into_iter().flat_map(|group| &group.members)) {
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
