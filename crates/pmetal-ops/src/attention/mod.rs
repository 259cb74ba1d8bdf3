//! Causal attention over rows of different lengths that lie behind one another.
//!
//! For each row and head: `out = softmax(scale * q kᵀ + mask) v`, query `i` of a row seeing its keys `0 ..= kv_len - q_len + i`;
//! `heads / kv_heads` query heads share a key head. The score matrix is never stored: the forward keeps the log-sum-exp of each query.
//! Source: Vaswani et al., 2017; Dao et al., "FlashAttention", 2022; Ainslie et al., "GQA", 2023.

mod cpu;
mod gpu;

use std::sync::{Arc, OnceLock};

use candle_core::{D, DType, Device, Tensor};
pub use pmetal_cpu::Segment;
use pmetal_metal::AttentionRows;
pub use pmetal_metal::AttentionSpec;

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

    fn segments(&self) -> &[Segment] {
        &self.0.segments
    }

    /// How many keys all queries together see.
    fn pairs(&self) -> usize {
        self.segments().iter().map(|s| s.q_len * s.kv_len - s.q_len * s.q_len.saturating_sub(1) / 2).sum()
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
/// GPU with `spare` free columns behind each row.
pub fn attention(q: &Value, k: &Value, v: &Value, rows: &Rows, spec: AttentionSpec, spare: usize) -> Result<Value> {
    let _span = profile::span(OP);
    check(q.tensor(), k.tensor(), v.tensor(), rows, &spec)?;
    let rows = rows.clone();
    let place = place(q.tensor(), OP)?;
    if let Place::Reference = place {
        return Ok(one(composite(&[q, k, v], move |t| Ok(vec![reference(&t[0], &t[1], &t[2], &rows, &spec)?]))?));
    }
    let readable = |x: &Value| match place {
        Place::Gpu(_) => gpu::readable(x.tensor()),
        _ => Ok(x.tensor().contiguous()?),
    };
    let (q_t, k_t, v_t) = (readable(q)?, readable(k)?, readable(v)?);
    // a product of every query with the keys it sees: scores and values here, those again and their gradients on the way back
    let product = 2.0 * (rows.pairs() * spec.heads * spec.head_dim) as f64;
    // queries and results, keys and values; on the way back those and the gradient of each
    let keys = rows.keys() * spec.kv_heads * spec.head_dim;
    let bytes = (2 * (q_t.elem_count() + keys) * q_t.dtype().size_in_bytes()) as f64;
    let compute = || {
        profile::work(|| 2.0 * product);
        profile::traffic(|| bytes);
        match &place {
            Place::Gpu(gpu) => gpu::forward(&**gpu, &q_t, &k_t, &v_t, &rows, &spec, spare),
            _ => cpu::forward(&q_t, &k_t, &v_t, &rows, &spec),
        }
    };
    let mut results = keep(OP, compute)?.into_iter();
    let (Some(parent), Some(stats)) = (results.next(), results.next()) else {
        return Err(Error::Lengths { op: OP, reason: "a kept result is missing".into() });
    };
    let out = parent.narrow(1, 0, spec.heads * spec.head_dim)?;
    let saved = out.clone();
    let grad_places = [q, k, v].map(Value::grad_place);
    let value = one(Value::record(vec![out], &[q, k, v], move |grads| {
        profile::work(|| 5.0 * product);
        profile::traffic(|| 2.0 * bytes);
        let dout = only(grads, OP)?;
        let qkv = [&q_t, &k_t, &v_t];
        let [dq, dk, dv] = match &place {
            Place::Gpu(gpu) => {
                gpu::backward(&**gpu, &gpu::readable(&dout)?, qkv, &saved, &stats, &grad_places, &rows, &spec)?
            }
            _ => cpu::backward(&dout.contiguous()?, qkv, &saved, &stats, &rows, &spec)?,
        };
        Ok(vec![Some(dq), Some(dk), Some(dv)])
    }));
    Ok(if parent.dims() == value.tensor().dims() { value } else { value.with_spare(parent) })
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Rows, spec: &AttentionSpec) -> Result<()> {
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
    rows.fit(tokens, keys)
}

/// The formula in plain candle, row by row.
fn reference(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Rows, spec: &AttentionSpec) -> candle_core::Result<Tensor> {
    let wide = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let group = spec.heads / spec.kv_heads;
    let mut outs = Vec::new();
    let heads_of = |t: &Tensor, heads: usize| t.reshape((t.dim(0)?, heads, spec.head_dim));
    let (q, k, v) = (heads_of(q, spec.heads)?, heads_of(k, spec.kv_heads)?, heads_of(v, spec.kv_heads)?);
    for s in rows.segments() {
        // [heads, len, head_dim]; each key head repeated for its group of query heads
        let q = q.narrow(0, s.q_start, s.q_len)?.to_dtype(wide)?.transpose(0, 1)?.contiguous()?;
        let spread = |t: &Tensor| {
            let t = t.narrow(0, s.kv_start, s.kv_len)?.to_dtype(wide)?.transpose(0, 1)?.unsqueeze(1)?;
            t.expand((spec.kv_heads, group, s.kv_len, spec.head_dim))?.reshape((spec.heads, s.kv_len, spec.head_dim))
        };
        let (k, v) = (spread(&k)?, spread(&v)?);
        let mask: Vec<f32> = (0..s.q_len)
            .flat_map(|i| (0..s.kv_len).map(move |j| if j <= s.kv_len - s.q_len + i { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let mask = Tensor::from_vec(mask, (1, s.q_len, s.kv_len), q.device())?.to_dtype(wide)?;
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? * f64::from(spec.scale))?.broadcast_add(&mask)?;
        let top = scores.max_keepdim(D::Minus1)?.detach();
        let weights = scores.broadcast_sub(&top)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        outs.push(weights.matmul(&v.contiguous()?)?.transpose(0, 1)?);
    }
    Tensor::cat(&outs, 0)?.flatten_from(1)?.to_dtype(q.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        autograd::gradients,
        rows::GradRows,
        testing::{assert_close, check_op, emulated, random},
    };

    const SPEC: AttentionSpec = AttentionSpec { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4 };

    #[test]
    fn packed_rows_and_their_gradients() {
        let rows = Rows::packed(&[3, 1, 5]);
        let reference_rows = rows.clone();
        check_op(
            &[random(&[9, 24], 1), random(&[9, 12], 2), random(&[9, 12], 3)],
            move |t| Ok(vec![reference(&t[0], &t[1], &t[2], &reference_rows, &SPEC)?]),
            |v| Ok(vec![attention(&v[0], &v[1], &v[2], &rows, SPEC, 5)?]),
        );
    }

    #[test]
    fn a_cached_row_continues_where_it_stopped() {
        let (capacity, kv_len) = (8, 7);
        let [k, v] = [2, 3].map(|seed| random(&[2 * capacity, 12], seed).to_dtype(DType::F32).unwrap());
        let q = random(&[3, 24], 1).to_dtype(DType::F32).unwrap();
        let rows = Rows::cached(&[2, 1], &[5, kv_len], capacity);
        let want = reference(&q, &k, &v, &rows, &SPEC).unwrap();
        let [q, k, v] = [q, k, v].map(Value::constant);
        let got = attention(&q, &k, &v, &rows, SPEC, 0).unwrap();
        assert_close(&want, got.tensor(), 1e-5, "cached");
    }

    /// Column ranges of one tensor in, free columns behind the result, gradients side by side: by the plain kernels (heads of 6) and on
    /// matrix units (heads of 8), which want rows to begin at multiples of 8.
    #[test]
    fn ranges_of_wider_rows() {
        for (head_dim, spare) in [(6, 3), (8, 16), (8, 3)] {
            emulated(|| ranges(head_dim, spare));
        }
    }

    fn ranges(head_dim: usize, spare: usize) {
        let spec = AttentionSpec { head_dim, ..SPEC };
        let (rows, tokens) = (Rows::packed(&[3, 1, 5]), 9);
        let widths = [4, 2, 2].map(|heads| heads * head_dim);
        let starts = [0, widths[0], widths[0] + widths[1]];
        let total: usize = widths.iter().sum();
        let joint = random(&[tokens, total + spare], 1).to_dtype(DType::F32).unwrap();
        let grads = GradRows::new(tokens, total + spare);
        let leaves = [0, 1, 2].map(|i| {
            let range = joint.narrow(1, starts[i], widths[i]).unwrap();
            Value::variable(range).with_grad_place(grads.place(starts[i]))
        });
        let parent = grads.parent(DType::F32, &Device::Cpu).unwrap();
        parent.slice_set(&Tensor::full(7f32, parent.shape(), &Device::Cpu).unwrap(), 0, 0).unwrap();
        let dout = random(&[tokens, widths[0]], 2).to_dtype(DType::F32).unwrap();

        let y = attention(&leaves[0], &leaves[1], &leaves[2], &rows, spec, spare).unwrap();
        assert_eq!(y.spare().unwrap().dims(), [tokens, widths[0] + spare]);
        let got = gradients(vec![(y.clone(), dout.clone())], &leaves.each_ref()).unwrap();
        let reference_rows = rows.clone();
        let inputs = leaves.each_ref().map(|leaf| Value::variable(leaf.tensor().to_dtype(DType::F64).unwrap()));
        let of_reference =
            composite(&inputs.each_ref(), move |t| Ok(vec![reference(&t[0], &t[1], &t[2], &reference_rows, &spec)?]));
        let want_y = one(of_reference.unwrap());
        assert_close(want_y.tensor(), y.tensor(), 1e-5, "out");
        let dout = dout.to_dtype(DType::F64).unwrap();
        let want = gradients(vec![(want_y, dout)], &inputs.each_ref()).unwrap();
        for i in 0..3 {
            let (want, got) = (want[i].as_ref().unwrap(), got[i].as_ref().unwrap());
            assert_close(want, got, 1e-5, "gradient");
            if (total + spare).is_multiple_of(8) || head_dim == 6 {
                assert_close(want, &parent.narrow(1, starts[i], widths[i]).unwrap(), 1e-5, "gradient in its place");
            }
        }
        let rest = parent.narrow(1, total, spare).unwrap().flatten_all().unwrap();
        assert!(rest.to_vec1::<f32>().unwrap().iter().all(|&x| x == 7.0), "columns of others stay");
    }

    #[test]
    fn rows_that_do_not_add_up_are_refused() {
        let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(h, s)| Value::constant(random(&[5, h * 6], s)));
        assert!(attention(&q, &k, &v, &Rows::packed(&[3, 3]), SPEC, 0).is_err());
        assert!(attention(&q, &k, &v, &Rows::packed(&[4]), SPEC, 0).is_err());
    }
}
