//! What picks the keys that a query sees: light scores of its own, of which the largest stay.
//!
//! `score(t, s) = Σ_h w_{t,h} relu(q_{t,h} · k_s)`, with queries from the short row that attention's queries come from. No gradient flows through it.
//! Source: DeepSeek-AI, "DeepSeek-V3.2", 2025, section 2.1.

use candle_core::{DType, Tensor};
use pmetal_ops::{LinearMember, Rows, Value, Weight, layer_norm, no_grad, rope, top_keys};

use super::{
    parts::{LinearShape, Linears, Named, Parts, take},
    pass::Pass,
};
use crate::{Error, IndexerSpec, Result};

/// Added to the variance of its keys.
const EPS: f64 = 1e-6;

#[derive(Clone)]
pub(super) struct Indexer {
    spec: IndexerSpec,
    queries: Linears,
    /// Keys, and the weights of the heads.
    from_stream: Linears,
    norm: [Named; 2],
}

/// What it has of the tokens of a pass.
pub(super) struct Index {
    spec: IndexerSpec,
    /// `[tokens, heads, head_dim]` f32.
    queries: Tensor,
    /// `[tokens, heads]` f32.
    weights: Tensor,
    /// `[tokens, head_dim]`.
    keys: Tensor,
}

impl Indexer {
    pub(super) fn new(spec: &IndexerSpec, rank: usize, hidden: usize, parts: &mut Parts) -> Result<Self> {
        let linear = |part, inputs, outputs| LinearShape { part, inputs, outputs, bias: false };
        let (heads, width) = (spec.heads, spec.head_dim);
        Ok(Self {
            spec: spec.clone(),
            queries: parts.linears(&[linear("self_attn.indexer.wq_b", rank, heads * width)])?,
            from_stream: parts.linears(&[
                linear("self_attn.indexer.wk", hidden, width),
                linear("self_attn.indexer.weights_proj", hidden, heads),
            ])?,
            norm: [
                parts.weight("self_attn.indexer.k_norm.weight", width)?,
                parts.weight("self_attn.indexer.k_norm.bias", width)?,
            ],
        })
    }

    /// Of the tokens of `x [tokens, hidden]` and of the short rows of their queries.
    pub(super) fn queries_and_keys(&self, x: &Value, short: &Value, pass: &Pass) -> Result<Index> {
        no_grad(|| {
            let table = pass.tables.get(self.spec.rope);
            let table = table.ok_or_else(|| Error::Input { reason: "the indexer's rope is missing".into() })?;
            let [x, short] = [x, short].map(|value| Value::constant(value.tensor().clone()));
            let [q] = take(self.queries.forward(&short, pass.noise)?)?;
            let [k, weights] = take(self.from_stream.forward(&x, pass.noise)?)?;
            let (&IndexerSpec { heads, head_dim, .. }, tokens) = (&self.spec, x.tensor().dim(0)?);
            let [weight, bias] = [self.norm[0].weight.value()?, self.norm[1].weight.value()?];
            let k = rope(&layer_norm(&k, &weight, Some(&bias), EPS, head_dim)?, table)?;
            let q = rope(&q, table)?.tensor().contiguous()?.reshape((tokens, heads, head_dim))?;
            Ok(Index {
                queries: q.to_dtype(DType::F32)?,
                weights: (weights.tensor().to_dtype(DType::F32)? * (heads as f64).powf(-0.5))?,
                keys: k.tensor().contiguous()?,
                spec: self.spec.clone(),
            })
        })
    }

    pub(super) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        self.queries.for_each(f)?;
        self.from_stream.for_each(f)
    }

    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        self.queries.named_weights(to);
        self.from_stream.named_weights(to);
        to.extend(self.norm.iter().map(Named::pair));
    }
}

impl Index {
    /// Keys of the tokens, `[tokens, head_dim]`.
    pub(super) fn keys(&self) -> &Tensor {
        &self.keys
    }

    /// The keys that each token sees, as places in its row; none where all rows are so short that every token sees all before it. `keys` are the places
    /// of a cache; without one the tokens' own.
    pub(super) fn selected(&self, rows: &Rows, keys: Option<&Tensor>) -> Result<Option<Vec<Vec<u32>>>> {
        let top_k = self.spec.top_k;
        if rows.segments().iter().all(|row| row.kv_len <= top_k) {
            return Ok(None);
        }
        let (keys, scale) = (keys.unwrap_or(&self.keys).to_dtype(DType::F32)?, (self.spec.head_dim as f64).powf(-0.5));
        let mut selected = Vec::new();
        for row in rows.segments() {
            let keys = keys.narrow(0, row.kv_start, row.kv_len)?.t()?;
            let heads = (0..self.spec.heads).map(|head| {
                let q = self.queries.narrow(0, row.q_start, row.q_len)?.narrow(1, head, 1)?.squeeze(1)?;
                let weights = self.weights.narrow(0, row.q_start, row.q_len)?.narrow(1, head, 1)?;
                (q.contiguous()?.matmul(&keys)? * scale)?.relu()?.broadcast_mul(&weights)
            });
            let mut scores = Tensor::zeros((row.q_len, row.kv_len), DType::F32, self.keys.device())?;
            for of_head in heads {
                scores = (scores + of_head?)?;
            }
            selected.extend(top_keys(&scores, top_k, row.kv_len - row.q_len)?);
        }
        Ok(Some(selected))
    }
}
