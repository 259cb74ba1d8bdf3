//! Attention whose keys and values are projections of the stream.

use candle_core::{DType, Tensor};
use pmetal_ops::{
    LinearMember, RmsNorm, Saved, Value, Weight, attention, autograd::saved, layer_norm, rms_norm_heads, rms_norm_rope,
    rope, scaled_rows, split_columns,
};

use super::{
    CacheUse, Pass,
    one_token::{HeadRows, Projections, lying},
    parts::{LinearShape, Linears, Named, Parts, take},
};
use crate::{HeadNorm, HeadsSpec, Result};

#[derive(Clone)]
pub(super) struct Heads {
    index: usize,
    spec: HeadsSpec,
    /// Of q and of k.
    norms: Option<[Named; 2]>,
    sinks: Option<Named>,
    qkv: Linears,
    output: Linears,
}

impl Heads {
    pub(super) fn new(spec: &HeadsSpec, hidden: usize, index: usize, parts: &mut Parts) -> Result<Self> {
        let HeadsSpec { attention, bias, .. } = spec;
        let [q, kv] = [attention.heads, attention.kv_heads].map(|heads| heads * attention.head_dim);
        let input = |part, outputs| LinearShape { part, inputs: hidden, outputs, bias: bias.qkv };
        let qkv = match spec.fused {
            true => parts.linears(&[input("self_attn.qkv_proj", q + 2 * kv)])?,
            false => parts.linears(&[
                input("self_attn.q_proj", q),
                input("self_attn.k_proj", kv),
                input("self_attn.v_proj", kv),
            ])?,
        };
        let output = parts.linears(&[LinearShape {
            part: "self_attn.o_proj",
            inputs: q,
            outputs: hidden,
            bias: bias.output,
        }])?;
        let mut norm = |part: &str, heads: usize| match spec.head_norm {
            Some(HeadNorm::Rms(_)) => parts.weight(part, attention.head_dim).map(Some),
            Some(HeadNorm::Layer { .. }) => parts.weight(part, (heads, attention.head_dim)).map(Some),
            Some(HeadNorm::Unit { .. }) | None => Ok(None),
        };
        let (q_norm, k_norm) =
            (norm("self_attn.q_norm.weight", attention.heads)?, norm("self_attn.k_norm.weight", attention.kv_heads)?);
        let sinks = if spec.sinks { Some(parts.weight("self_attn.sinks", attention.heads)?) } else { None };
        Ok(Self { index, spec: spec.clone(), norms: q_norm.zip(k_norm).map(Into::into), sinks, qkv, output })
    }

    pub(super) fn spare_columns(&self) -> usize {
        self.qkv.spare_columns()
    }

    /// What the tokens of `x [tokens, hidden]` read of one another, of the same shape. `ends` says that nothing but the sum with the stream reads it.
    pub(super) fn forward(&self, x: &Value, pass: &Pass, cache: CacheUse, ends: bool) -> Result<Value> {
        let [q, k, v] = self.projected(x, pass)?;
        let sinks = self.sinks.as_ref().map(|sinks| sinks.weight.value()).transpose()?;
        let q = self.turned(&q, 0, pass)?;
        let q = match &self.spec.temperature {
            Some(temperature) => {
                let factors: Vec<f32> = pass.positions.iter().map(|&position| temperature.at(position)).collect();
                scaled_rows(&q, &factors)?
            }
            None => q,
        };
        let k = self.turned(&k, 1, pass)?;
        let (k, v) = match cache {
            Some((cache, q_lens)) => {
                let [keys, values] = take(cache.extend(self.index, &[k.tensor(), v.tensor()], q_lens)?)?;
                (Value::constant(keys), Value::constant(values))
            }
            None => (k, v),
        };
        let (attention_spec, spare) = (self.spec.attention, self.output.spare_columns());
        let y = saved(Saved::Attention, || attention(&q, &k, &v, sinks.as_ref(), &pass.rows, attention_spec, spare))?;
        let output = || self.output.forward(&y, pass.noise);
        let [y] = take(if ends { saved(Saved::Middle, output) } else { output() }?)?;
        Ok(y)
    }

    fn projected(&self, x: &Value, pass: &Pass) -> Result<[Value; 3]> {
        let qkv = saved(Saved::Projections, || self.qkv.forward(x, pass.noise))?;
        if !self.spec.fused {
            return take(qkv);
        }
        let [joint] = take(qkv)?;
        let attention = &self.spec.attention;
        let [q, kv] = [attention.heads, attention.kv_heads].map(|heads| heads * attention.head_dim);
        take(split_columns(&joint, &[q, kv, kv])?)
    }

    /// q (`which` 0) or k (1), `[tokens, heads * head_dim]`, each head normalised and turned.
    fn turned(&self, x: &Value, which: usize, pass: &Pass) -> Result<Value> {
        let table = self.spec.rope.and_then(|rope| pass.tables.get(rope));
        let width = self.spec.attention.head_dim;
        let weight = self.norms.as_ref().map(|norms| norms[which].weight.value()).transpose()?;
        let by_mean_square = |norm: RmsNorm, weight: &Value| {
            Ok(match table {
                Some(table) => rms_norm_rope(x, weight, norm, table)?,
                None => rms_norm_heads(x, weight, norm)?,
            })
        };
        match (self.spec.head_norm, weight) {
            (Some(HeadNorm::Rms(norm)), Some(weight)) => by_mean_square(norm, &weight),
            (Some(HeadNorm::Unit { eps }), _) => {
                // a turn leaves the mean square as it is, so the order of the two does not matter
                let ones = Tensor::ones(width, DType::F32, x.tensor().device())?;
                by_mean_square(RmsNorm::new(eps), &Value::constant(ones))
            }
            (Some(HeadNorm::Layer { eps }), Some(weight)) => {
                let normed = layer_norm(x, &weight.reshape(weight.tensor().elem_count())?, None, eps, width)?;
                Ok(match table {
                    Some(table) => rope(&normed, table)?,
                    None => normed,
                })
            }
            _ => Ok(match table {
                Some(table) => rope(x, table)?,
                None => x.clone(),
            }),
        }
    }

    pub(super) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        self.qkv.for_each(f)?;
        self.output.for_each(f)
    }

    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        self.qkv.named_weights(to);
        self.output.named_weights(to);
        to.extend(self.norms.iter().flatten().chain(&self.sinks).map(Named::pair));
    }

    /// Its projections and the norms of its heads for one token at a time; none where they do not lie on the device in `dtype`.
    pub(super) fn rows(&self, dtype: DType) -> Result<Option<HeadRows>> {
        let [Some(qkv), Some(output)] =
            [Projections::of(self.qkv.group(), dtype)?, Projections::of(self.output.group(), dtype)?]
        else {
            return Ok(None);
        };
        let lying_norm = |norm: &Named| lying(&norm.weight, dtype);
        let norms = match &self.norms {
            Some([q, k]) => match (lying_norm(q), lying_norm(k)) {
                (Some(q), Some(k)) => Some([q, k]),
                _ => return Ok(None),
            },
            None => None,
        };
        Ok(Some(([qkv, output], norms)))
    }
}
