//! Attention whose keys and values are projections of one short row per token.
//!
//! For each head `q = [q_nope | turned q_rope]`, `k = [W_k c | turned k_rope]`, `v = W_v c`, where `c` is the short row and `k_rope` is shared by all
//! heads. A cache holds `[c | k_rope]` alone: there the products with `W_k` and `W_v` go to the other side, `q_nope W_k` meets `c` itself, and what heads
//! read of the rows goes through `W_v` at the end. Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.

use candle_core::Tensor;
use pmetal_ops::{
    AttentionSpec, LinearMember, Reach, Saved, Value, Weight, attention, autograd::saved, cut_heads, join_columns,
    join_heads, join_heads_with_shared, pad_heads, product_by_heads, rms_norm, rope, sparse_attention, split_columns,
};

use super::{
    indexer::Indexer,
    parts::{LinearShape, Linears, Named, Parts, take},
    pass::{CacheUse, Pass},
};
use crate::{Error, LatentSpec, Result};

#[derive(Clone)]
pub(super) struct Latent {
    index: usize,
    spec: LatentSpec,
    /// From the stream: the short row of q, or q itself; the short row of keys and values with the shared columns of k.
    down: Linears,
    /// From the short row of q.
    q_up: Option<(Named, Linears)>,
    kv_norm: Named,
    kv_up: Linears,
    output: Linears,
    indexer: Option<Indexer>,
}

impl Latent {
    pub(super) fn new(spec: &LatentSpec, hidden: usize, index: usize, parts: &mut Parts) -> Result<Self> {
        let LatentSpec { heads, bias, .. } = *spec;
        let linear = |part, inputs, outputs, bias| LinearShape { part, inputs, outputs, bias };
        let (q, value) = (heads * spec.qk_head_dim(), heads * spec.v_head_dim);
        let kv_down = linear("self_attn.kv_a_proj_with_mqa", hidden, spec.kept_width(), bias);
        let (down, q_up) = match spec.q_lora_rank {
            Some(rank) => {
                let down = parts.linears(&[linear("self_attn.q_a_proj", hidden, rank, bias), kv_down])?;
                let norm = parts.weight("self_attn.q_a_layernorm.weight", rank)?;
                (down, Some((norm, parts.linears(&[linear("self_attn.q_b_proj", rank, q, false)])?)))
            }
            None => (parts.linears(&[linear("self_attn.q_proj", hidden, q, false), kv_down])?, None),
        };
        let kv_norm = parts.weight("self_attn.kv_a_layernorm.weight", spec.kv_lora_rank)?;
        let both = heads * (spec.qk_nope_head_dim + spec.v_head_dim);
        let kv_up = parts.linears(&[linear("self_attn.kv_b_proj", spec.kv_lora_rank, both, false)])?;
        let output = parts.linears(&[linear("self_attn.o_proj", value, hidden, bias)])?;
        let indexer = match (&spec.indexer, spec.q_lora_rank) {
            (Some(indexer), Some(rank)) => Some(Indexer::new(indexer, rank, hidden, parts)?),
            _ => None,
        };
        Ok(Self { index, spec: spec.clone(), down, q_up, kv_norm, kv_up, output, indexer })
    }

    pub(super) fn spare_columns(&self) -> usize {
        self.down.spare_columns()
    }

    /// What the tokens of `x [tokens, hidden]` read of one another, of the same shape. `ends` says that nothing but the sum with the stream reads it.
    pub(super) fn forward(&self, x: &Value, pass: &Pass, cache: CacheUse, ends: bool) -> Result<Value> {
        let spec = &self.spec;
        let [q, row] = take(saved(Saved::Projections, || self.down.forward(x, pass.noise))?)?;
        let (q, short) = match &self.q_up {
            Some((norm, up)) => {
                let short = rms_norm(&q, &norm.weight.value()?, spec.norm, up.spare_columns())?;
                let [q] = take(up.forward(&short, pass.noise)?)?;
                (q, Some(short))
            }
            None => (q, None),
        };
        let [compressed, k_rope] = take(split_columns(&row, &[spec.kv_lora_rank, spec.qk_rope_head_dim])?)?;
        let compressed = rms_norm(&compressed, &self.kv_norm.weight.value()?, spec.norm, self.kv_up.spare_columns())?;
        let [q_table, k_table] = self.tables(pass)?;
        let (q, k_rope) = (rope(&q, q_table)?, rope(&k_rope, k_table)?);
        let index = match (&self.indexer, short) {
            (Some(indexer), Some(short)) => Some(indexer.queries_and_keys(x, &short, pass)?),
            _ => None,
        };
        let y = match cache {
            None => {
                let selected = index.map(|index| index.selected(&pass.rows, None)).transpose()?.flatten();
                self.by_heads(&q, &compressed, &k_rope, pass, selected.as_deref())?
            }
            Some((cache, q_lens)) => {
                let kept = join_columns(&[compressed, k_rope])?;
                let new: Vec<&Tensor> = std::iter::once(kept.tensor()).chain(index.iter().map(|i| i.keys())).collect();
                let places = cache.extend(self.index, &new, q_lens)?;
                let (Some(rows), index_keys) = (places.first(), places.get(1)) else {
                    return Err(Error::Input { reason: "the cache is another model's".into() });
                };
                let selected = index.map(|index| index.selected(&pass.rows, index_keys)).transpose()?.flatten();
                self.absorbed(&q, rows, pass, selected.as_deref())?
            }
        };
        let output = || self.output.forward(&y, pass.noise);
        let [y] = take(if ends { saved(Saved::Middle, output) } else { output() }?)?;
        Ok(y)
    }

    fn tables<'a>(&self, pass: &'a Pass) -> Result<[&'a pmetal_ops::RopeTable; 2]> {
        take(self.spec.ropes.iter().filter_map(|&rope| pass.tables.get(rope)).collect())
    }

    /// Attention over keys and values of every head, `[tokens, heads * v_head_dim]`.
    fn by_heads(
        &self,
        q: &Value,
        compressed: &Value,
        k_rope: &Value,
        pass: &Pass,
        selected: Option<&[Vec<u32>]>,
    ) -> Result<Value> {
        let LatentSpec { heads, qk_nope_head_dim: nope, v_head_dim, .. } = self.spec;
        let [kv] = take(self.kv_up.forward(compressed, pass.noise)?)?;
        let k = join_heads_with_shared(&cut_heads(&kv, heads, 0, nope)?, k_rope, heads)?;
        let v = cut_heads(&kv, heads, nope, v_head_dim)?;
        // kernels have one width for all: zeros add nothing to a product
        let width = self.spec.qk_head_dim().max(v_head_dim);
        let wide = |x: Value, from: usize| if from == width { Ok(x) } else { pad_heads(&x, heads, width) };
        let (q, k) = (wide(q.clone(), self.spec.qk_head_dim())?, wide(k, self.spec.qk_head_dim())?);
        let v = wide(v, v_head_dim)?;
        let spec = self.attention(heads, width);
        let y = saved(Saved::Attention, || match selected {
            Some(selected) => sparse_attention(&q, &k, &v, selected, &pass.rows, spec),
            None => attention(&q, &k, &v, None, &pass.rows, spec, 0),
        })?;
        Ok(if v_head_dim == width { y } else { cut_heads(&y, heads, 0, v_head_dim)? })
    }

    /// Attention over the short rows in a cache, `[tokens, heads * v_head_dim]`.
    fn absorbed(&self, q: &Value, rows: &Tensor, pass: &Pass, selected: Option<&[Vec<u32>]>) -> Result<Value> {
        let LatentSpec { heads, kv_lora_rank: rank, qk_nope_head_dim: nope, qk_rope_head_dim, v_head_dim, .. } =
            self.spec;
        let weight = Weight::Frozen(self.kv_up.merged(0)?);
        let each = nope + v_head_dim;
        let turned = cut_heads(q, heads, nope, qk_rope_head_dim)?;
        let q = product_by_heads(cut_heads(q, heads, 0, nope)?.tensor(), &weight, heads, 0..nope, false)?;
        let q = join_heads(&Value::constant(q), &turned, heads)?;
        let rows = Value::constant(rows.clone());
        let spec = AttentionSpec { kv_heads: 1, ..self.attention(heads, self.spec.kept_width()) };
        let y = match selected {
            Some(selected) => sparse_attention(&q, &rows, &rows, selected, &pass.rows, spec)?,
            None => attention(&q, &rows, &rows, None, &pass.rows, spec, 0)?,
        };
        let y = cut_heads(&y, heads, 0, rank)?;
        Ok(Value::constant(product_by_heads(y.tensor(), &weight, heads, nope..each, true)?))
    }

    fn attention(&self, heads: usize, head_dim: usize) -> AttentionSpec {
        AttentionSpec { heads, kv_heads: heads, head_dim, scale: self.spec.scale, reach: Reach::All, softcap: None }
    }

    pub(super) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        self.down.for_each(f)?;
        if let Some((_, up)) = &mut self.q_up {
            up.for_each(f)?;
        }
        self.kv_up.for_each(f)?;
        self.output.for_each(f)?;
        self.indexer.iter_mut().try_for_each(|indexer| indexer.for_each_linear(f))
    }

    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        self.down.named_weights(to);
        if let Some((norm, up)) = &self.q_up {
            to.push(norm.pair());
            up.named_weights(to);
        }
        to.push(self.kv_norm.pair());
        self.kv_up.named_weights(to);
        self.output.named_weights(to);
        self.indexer.iter().for_each(|indexer| indexer.named_weights(to));
    }
}
