//! An attention for tests on a device, and what the formula says of it in f64.

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{AttentionRows, AttentionSpec, Reach, Result, empty};

/// Tensors of one attention, and their numbers as rounded.
#[derive(Clone)]
pub(super) struct Case {
    /// First query, queries, first key and keys of each row.
    table: Vec<[usize; 4]>,
    pub(super) rows: AttentionRows,
    pub(super) spec: AttentionSpec,
    /// q, k, v, dout.
    pub(super) inputs: [Tensor; 4],
    numbers: [Vec<f64>; 4],
    /// out, dq, dk, dv.
    pub(super) outputs: [Tensor; 4],
}

impl Case {
    /// Rows whose queries and keys are the same tokens, and see all up to their own.
    pub(super) fn new(lengths: &[usize], heads: [usize; 3], dtype: DType, device: &Device) -> Result<Self> {
        let rows: Vec<_> = lengths.iter().map(|&n| [n, n]).collect();
        Self::of(&rows, heads, dtype, device)
    }

    /// Rows of so many queries, the last of so many keys. As [`Case::new`] otherwise.
    pub(super) fn of(
        lengths: &[[usize; 2]],
        [heads, kv_heads, head_dim]: [usize; 3],
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut table: Vec<[usize; 4]> = Vec::new();
        let (mut tokens, mut kv_tokens) = (0, 0);
        for &[queries, keys] in lengths {
            table.push([tokens, queries, kv_tokens, keys]);
            (tokens, kv_tokens) = (tokens + queries, kv_tokens + keys);
        }
        let upload = |numbers: &[u32]| Tensor::from_slice(numbers, numbers.len(), device);
        let rows = AttentionRows::new::<candle_core::Error>(&table, upload)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let spec = AttentionSpec { heads, kv_heads, head_dim, scale, reach: Reach::All, softcap: None };
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 22) as f32 - 2.0
        };
        let mut made = Vec::new();
        // of rows with a pitch, each its own
        let sides = [(tokens, heads), (kv_tokens, kv_heads), (kv_tokens, kv_heads), (tokens, heads)];
        for (i, (tokens, heads)) in sides.into_iter().enumerate() {
            let (width, pitch) = (heads * head_dim, heads * head_dim + 8 * i);
            let values: Vec<f32> = (0..tokens * pitch).map(|_| next()).collect();
            let tensor = Tensor::from_vec(values, (tokens, pitch), device)?.to_dtype(dtype)?.narrow(1, 0, width)?;
            made.push((host(&tensor)?, tensor));
        }
        let (numbers, inputs): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let fresh = |(tokens, heads), more| {
            let width = heads * head_dim;
            Ok::<_, pmetal_metal::Error>(empty((tokens, width + more), dtype, device)?.narrow(1, 0, width)?)
        };
        let outputs = [fresh(sides[0], 16)?, fresh(sides[0], 0)?, fresh(sides[1], 8)?, fresh(sides[1], 24)?];
        let (Ok(inputs), Ok(numbers)) = (inputs.try_into(), numbers.try_into()) else { unreachable!("four of each") };
        Ok(Self { table, rows, spec, inputs, numbers, outputs })
    }

    /// out, dq, dk, dv by the formula.
    pub(super) fn expected(&self) -> [Vec<f64>; 4] {
        let [q, k, v, dout] = &self.numbers;
        let AttentionSpec { heads, kv_heads, head_dim: d, scale, reach, softcap } = self.spec;
        // a score and its slope by the product of query and key
        let score_of = |product: f64| {
            let score = f64::from(scale) * product;
            let capped =
                |cap: f64| (cap * (score / cap).tanh(), f64::from(scale) * (1.0 - (score / cap).tanh().powi(2)));
            softcap.map_or((score, f64::from(scale)), |cap| capped(f64::from(cap)))
        };
        let mut results = [q, q, k, v].map(|like| vec![0f64; like.len()]);
        let [out, dq, dk, dv] = &mut results;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let add = |to: &mut [f64], from: &[f64], factor: f64| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
        };
        for &[start, queries, first_key, keys] in &self.table {
            for (head, i) in (0..heads).flat_map(|head| (0..queries).map(move |i| (head, i))) {
                let (query, position) = (start + i, keys - queries + i);
                let seen = first_key + reach.first(position)..=first_key + position;
                let own = (query * heads + head) * d..(query * heads + head + 1) * d;
                let of_key = |key: usize| {
                    let at = (key * kv_heads + head / (heads / kv_heads)) * d;
                    at..at + d
                };
                let scores: Vec<(f64, f64)> =
                    seen.clone().map(|key| score_of(dot(&q[own.clone()], &k[of_key(key)]))).collect();
                let most = scores.iter().map(|&(score, _)| score).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|(score, _)| (score - most).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|(score, _)| (score - most).exp() / sum).collect();
                for (key, &p) in seen.clone().zip(&p) {
                    add(&mut out[own.clone()], &v[of_key(key)], p);
                }
                let mean = dot(&dout[own.clone()], &out[own.clone()]);
                for ((key, &p), (_, slope)) in seen.zip(&p).zip(&scores) {
                    add(&mut dv[of_key(key)], &dout[own.clone()], p);
                    let ds = p * (dot(&dout[own.clone()], &v[of_key(key)]) - mean) * slope;
                    add(&mut dq[own.clone()], &k[of_key(key)], ds);
                    add(&mut dk[of_key(key)], &q[own.clone()], ds);
                }
            }
        }
        results
    }
}

pub(super) fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(values.into_iter().map(f64::from).collect())
}

/// The root of the squared error over that of the squares.
pub(super) fn error(got: &[f64], expected: &[f64]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let of_error = squares(&mut got.iter().zip(expected).map(|(got, expected)| got - expected));
    (of_error / squares(&mut expected.iter().copied())).sqrt()
}
