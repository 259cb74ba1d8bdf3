//! Causal attention over rows of different lengths that lie behind one another.
//!
//! For each row and head: `out = softmax(scale * q kᵀ + mask) v`, query `i` of a row seeing its keys `.. = kv_len - q_len + i` as far back as a
//! [`Reach`] says; `heads / kv_heads` query heads share a key head. Scores may have a soft cap, and each head a sink: one logit more in its
//! queries' softmax, whose share is dropped. The score matrix is never stored: the forward keeps the log-sum-exp of each query.
//! Source: Vaswani et al., 2017; Dao et al., "FlashAttention", 2022; Ainslie et al., "GQA", 2023; for caps Gemma Team, "Gemma 2", 2024; for
//! sinks Xiao et al., "Efficient streaming language models with attention sinks", 2024, and OpenAI, "gpt-oss", 2025.

mod cpu;
mod gpu;
mod sparse;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Device, Tensor};
pub use pmetal_cpu::Segment;
use pmetal_metal::AttentionRows;
pub use pmetal_metal::{AttentionSpec, Reach};
pub use sparse::{sparse_attention, top_keys};

use crate::{
    Error, Result,
    autograd::{Value, composite, keep, one, only},
    place::{Place, place, upload},
    profile,
};

const OP: &str = "attention";

/// Where each row of a batch lies among the queries and among the keys.
#[derive(Clone, Debug)]
pub struct Rows(Arc<Places>);

#[derive(Debug)]
struct Places {
    segments: Vec<Segment>,
    /// On the device that asked first: a pass asks once for each layer.
    sent: OnceLock<AttentionRows>,
}

impl Rows {
    /// Rows that lie behind one another without a cache: queries and keys are the same tokens.
    pub fn packed(lengths: &[usize]) -> Self {
        let mut start = 0;
        let segments = lengths.iter().map(|&len| {
            let segment = Segment { q_start: start, q_len: len, kv_start: start, kv_len: len };
            start += len;
            segment
        });
        Self::new(segments.collect())
    }

    /// Rows whose keys lie in a cache with `capacity` places per row.
    pub fn cached(q_lens: &[usize], kv_lens: &[usize], capacity: usize) -> Self {
        let mut q_start = 0;
        let segments = q_lens.iter().zip(kv_lens).enumerate().map(|(row, (&q_len, &kv_len))| {
            let segment = Segment { q_start, q_len, kv_start: row * capacity, kv_len };
            q_start += q_len;
            segment
        });
        Self::new(segments.collect())
    }

    fn new(segments: Vec<Segment>) -> Self {
        Self(Arc::new(Places { segments, sent: OnceLock::new() }))
    }

    /// Where each row lies.
    pub fn segments(&self) -> &[Segment] {
        &self.0.segments
    }

    /// How many keys all queries together see.
    fn pairs(&self, reach: Reach) -> usize {
        let of_row = |s: &Segment| match reach {
            Reach::All => s.q_len * s.kv_len - s.q_len * s.q_len.saturating_sub(1) / 2,
            _ => (s.kv_len - s.q_len..s.kv_len).map(|position| position + 1 - reach.first(position)).sum(),
        };
        self.segments().iter().map(of_row).sum()
    }

    /// Keys of the longest row.
    fn longest(&self) -> usize {
        self.segments().iter().map(|s| s.kv_len).max().unwrap_or(0)
    }

    /// Keys of all rows.
    fn keys(&self) -> usize {
        self.segments().iter().map(|s| s.kv_len).sum()
    }

    /// The rows as kernels of a GPU read them.
    fn on(&self, device: &Device) -> Result<AttentionRows> {
        if let Some(sent) = self.0.sent.get().filter(|sent| sent.table.device().same_device(device)) {
            return Ok(sent.clone());
        }
        let segments: Vec<_> = self.segments().iter().map(|s| [s.q_start, s.q_len, s.kv_start, s.kv_len]).collect();
        let rows = AttentionRows::new(&segments, |numbers| upload(numbers, device))?;
        Ok(self.0.sent.get_or_init(|| rows.clone()).clone())
    }

    fn fit(&self, queries: usize, keys: usize) -> Result<()> {
        let mut next = 0;
        for s in self.segments() {
            if s.q_start != next || s.q_len > s.kv_len || s.kv_start + s.kv_len > keys {
                return Err(Error::Lengths {
                    op: OP,
                    reason: format!("row {s:?} does not fit {queries} queries and {keys} keys"),
                });
            }
            next += s.q_len;
        }
        if next != queries {
            return Err(Error::Lengths { op: OP, reason: format!("rows hold {next} queries, there are {queries}") });
        }
        Ok(())
    }
}

/// Attention of `q [tokens, heads * head_dim]` over `k` and `v [kv_tokens, kv_heads * head_dim]`; returns `[tokens, heads * head_dim]`, on a
/// GPU with `spare` free columns behind each row. `sinks` are `[heads]`, of any float dtype.
pub fn attention(
    q: &Value,
    k: &Value,
    v: &Value,
    sinks: Option<&Value>,
    rows: &Rows,
    spec: AttentionSpec,
    spare: usize,
) -> Result<Value> {
    let _span = profile::span(OP);
    check(q.tensor(), k.tensor(), v.tensor(), sinks, rows, &spec)?;
    let (rows, spec) = (rows.clone(), AttentionSpec { reach: spec.reach.within(rows.longest()), ..spec });
    let place = place(q.tensor(), OP)?;
    if spec.head_dim > widest(&place) {
        let inputs: Vec<&Value> = [q, k, v].into_iter().chain(sinks).collect();
        let formula = move |t: &[Tensor]| Ok(vec![reference(&t[0], &t[1], &t[2], t.get(3), &rows, &spec)?]);
        return Ok(one(composite(&inputs, formula)?));
    }
    let readable = |x: &Value| match place {
        Place::Gpu(_) => gpu::readable(x.tensor()),
        _ => Ok(x.tensor().contiguous()?),
    };
    let (q_t, k_t, v_t) = (readable(q)?, readable(k)?, readable(v)?);
    let sinks_t = sinks.map(|sinks| sinks.tensor().to_dtype(DType::F32)?.contiguous()).transpose()?;
    // a product of every query with the keys it sees: scores and values here, those again and their gradients on the way back
    let product = 2.0 * (rows.pairs(spec.reach) * spec.heads * spec.head_dim) as f64;
    // queries and results, keys and values; on the way back those and the gradient of each
    let keys = rows.keys() * spec.kv_heads * spec.head_dim;
    let bytes = (2 * (q_t.elem_count() + keys) * q_t.dtype().size_in_bytes()) as f64;
    let compute = || {
        profile::work(|| 2.0 * product);
        profile::traffic(|| bytes);
        match &place {
            Place::Gpu(gpu) => gpu::forward(&**gpu, &q_t, &k_t, &v_t, sinks_t.as_ref(), &rows, &spec, spare),
            _ => cpu::forward(&q_t, &k_t, &v_t, sinks_t.as_ref(), &rows, &spec),
        }
    };
    let mut results = keep(OP, compute)?.into_iter();
    let (Some(parent), Some(stats), shares) = (results.next(), results.next(), results.next()) else {
        return Err(Error::Lengths { op: OP, reason: "a kept result is missing".into() });
    };
    let out = parent.narrow(1, 0, spec.heads * spec.head_dim)?;
    let saved = out.clone();
    let grad_places = [q, k, v].map(Value::grad_place);
    let inputs: Vec<&Value> = [q, k, v].into_iter().chain(sinks).collect();
    let sinks = sinks.filter(|sinks| sinks.requires_grad()).map(|sinks| sinks.tensor().dtype());
    let value = one(Value::record(vec![out], &inputs, move |grads| {
        profile::work(|| 5.0 * product);
        profile::traffic(|| 2.0 * bytes);
        let dout = only(grads, OP)?;
        let qkv = [&q_t, &k_t, &v_t];
        let dout = if let Place::Gpu(_) = place { gpu::readable(&dout)? } else { dout.contiguous()? };
        let [dq, dk, dv] = match &place {
            Place::Gpu(gpu) => gpu::backward(&**gpu, &dout, qkv, &saved, &stats, &grad_places, &rows, &spec)?,
            _ => cpu::backward(&dout, qkv, &saved, &stats, &rows, &spec)?,
        };
        let mut found = vec![Some(dq), Some(dk), Some(dv)];
        found.extend(
            sinks_t
                .as_ref()
                .map(|sinks_t| {
                    let Some(dtype) = sinks else { return Ok(None) };
                    let dsinks = match (&place, &shares) {
                        (Place::Gpu(gpu), Some(shares)) => {
                            gpu::backward_of_sinks(&**gpu, &dout, &saved, shares, &spec)?
                        }
                        _ => cpu::backward_of_sinks(sinks_t, &dout, &saved, &stats)?,
                    };
                    Ok::<_, Error>(Some(dsinks.to_dtype(dtype)?))
                })
                .transpose()?,
        );
        Ok(found)
    }));
    Ok(if parent.dims() == value.tensor().dims() { value } else { value.with_spare(parent) })
}

/// The widest head of a place's kernels: none where there are none.
fn widest(place: &Place) -> usize {
    match place {
        Place::Cpu => pmetal_cpu::MAX_HEAD_DIM,
        Place::Gpu(_) => gpu::MAX_WIDTH,
        Place::Reference => 0,
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, sinks: Option<&Value>, rows: &Rows, spec: &AttentionSpec) -> Result<()> {
    let (tokens, keys) = (q.dim(0)?, k.dim(0)?);
    for (what, t, len, heads) in
        [("q", q, tokens, spec.heads), ("k", k, keys, spec.kv_heads), ("v", v, keys, spec.kv_heads)]
    {
        if t.dims() != [len, heads * spec.head_dim] {
            return Err(Error::operand(OP, what, [len, heads * spec.head_dim], t.dims()));
        }
        if t.dtype() != q.dtype() {
            return Err(Error::operand(OP, what, q.dtype(), t.dtype()));
        }
    }
    if spec.kv_heads == 0 || !spec.heads.is_multiple_of(spec.kv_heads) {
        return Err(Error::operand(OP, "heads", format!("a multiple of {}", spec.kv_heads), spec.heads));
    }
    if let Some(sinks) = sinks.map(Value::tensor)
        && (sinks.dims() != [spec.heads] || !sinks.dtype().is_float())
    {
        let expected = format!("[{}] of floats", spec.heads);
        return Err(Error::operand(OP, "sinks", expected, format!("{:?} of {:?}", sinks.dims(), sinks.dtype())));
    }
    if matches!(spec.reach, Reach::Window(0) | Reach::Chunk(0)) {
        return Err(Error::operand(OP, "reach", "at least one key", format!("{:?}", spec.reach)));
    }
    if let Some(cap) = spec.softcap
        && !(cap.is_finite() && cap > 0.0)
    {
        return Err(Error::operand(OP, "softcap", "a positive number", cap));
    }
    rows.fit(tokens, keys)
}

/// The formula in plain candle, row by row.
fn reference(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sinks: Option<&Tensor>,
    rows: &Rows,
    spec: &AttentionSpec,
) -> candle_core::Result<Tensor> {
    let wide = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (group, width) = (spec.heads / spec.kv_heads, spec.head_dim);
    let sinks = sinks.map(|sinks| sinks.to_dtype(wide)?.reshape((spec.heads, 1, 1))).transpose()?;
    let mut outs = Vec::new();
    for s in rows.segments() {
        // [kv_heads, group * q_len, width]: the queries of all heads that share a key head meet it together
        let q = q.narrow(0, s.q_start, s.q_len)?.to_dtype(wide)?.reshape((s.q_len, spec.heads, width))?;
        let q = q.transpose(0, 1)?.contiguous()?.reshape((spec.kv_heads, group * s.q_len, width))?;
        let keys_of = |t: &Tensor| {
            let t = t.narrow(0, s.kv_start, s.kv_len)?.to_dtype(wide)?.reshape((s.kv_len, spec.kv_heads, width))?;
            t.transpose(0, 1)
        };
        let scores = (q.matmul(&keys_of(k)?.transpose(1, 2)?.contiguous()?)? * f64::from(spec.scale))?;
        let scores = match spec.softcap.map(f64::from) {
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
            None => scores,
        };
        let scores =
            scores.reshape((spec.heads, s.q_len, s.kv_len))?.broadcast_add(&mask(s, spec, q.device(), wide)?)?;
        let mut top = scores.max_keepdim(D::Minus1)?;
        if let Some(sinks) = &sinks {
            top = top.broadcast_maximum(sinks)?;
        }
        let top = top.detach();
        let weights = scores.broadcast_sub(&top)?.exp()?;
        let mut sum = weights.sum_keepdim(D::Minus1)?;
        if let Some(sinks) = &sinks {
            sum = (sum + sinks.broadcast_sub(&top)?.exp()?)?;
        }
        let weights = weights.broadcast_div(&sum)?.reshape((spec.kv_heads, group * s.q_len, s.kv_len))?;
        let out = weights.matmul(&keys_of(v)?.contiguous()?)?.reshape((spec.heads, s.q_len, width))?;
        outs.push(out.transpose(0, 1)?);
    }
    Tensor::cat(&outs, 0)?.flatten_from(1)?.to_dtype(q.dtype())
}

/// `[1, q_len, kv_len]`: minus infinity where a query does not see a key.
fn mask(s: &Segment, spec: &AttentionSpec, device: &Device, dtype: DType) -> candle_core::Result<Tensor> {
    let sees = |i, j| {
        let position = s.kv_len - s.q_len + i;
        spec.reach.first(position) <= j && j <= position
    };
    let of_query = |i| (0..s.kv_len).map(move |j| if sees(i, j) { 0.0 } else { f32::NEG_INFINITY });
    let mask: Vec<f32> = (0..s.q_len).flat_map(of_query).collect();
    Tensor::from_vec(mask, (1, s.q_len, s.kv_len), device)?.to_dtype(dtype)
}
