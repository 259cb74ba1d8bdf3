//! An attention over packed rows for tests on a device, and what the formula says of it in f64.

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{AttentionRows, AttentionSpec, Reach, Result, empty};

/// Tensors of one attention, and their numbers as rounded.
#[derive(Clone)]
pub(super) struct Case {
    lengths: Vec<usize>,
    pub(super) rows: AttentionRows,
    pub(super) spec: AttentionSpec,
    /// q, k, v, dout.
    pub(super) inputs: [Tensor; 4],
    numbers: [Vec<f64>; 4],
    /// out, dq, dk, dv.
    pub(super) outputs: [Tensor; 4],
}

impl Case {
    pub(super) fn new(
        lengths: &[usize],
        [heads, kv_heads, head_dim]: [usize; 3],
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let tokens: usize = lengths.iter().sum();
        let starts = lengths.iter().scan(0, |next, &n| Some(std::mem::replace(next, *next + n)));
        let table: Vec<_> = starts.zip(lengths).map(|(start, &n)| [start, n, start, n]).collect();
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
        for (i, heads) in [heads, kv_heads, kv_heads, heads].into_iter().enumerate() {
            let (width, pitch) = (heads * head_dim, heads * head_dim + 8 * i);
            let values: Vec<f32> = (0..tokens * pitch).map(|_| next()).collect();
            let tensor = Tensor::from_vec(values, (tokens, pitch), device)?.to_dtype(dtype)?.narrow(1, 0, width)?;
            made.push((host(&tensor)?, tensor));
        }
        let (numbers, inputs): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let fresh = |heads, more| {
            let width = heads * head_dim;
            Ok::<_, pmetal_metal::Error>(empty((tokens, width + more), dtype, device)?.narrow(1, 0, width)?)
        };
        let outputs = [fresh(heads, 16)?, fresh(heads, 0)?, fresh(kv_heads, 8)?, fresh(kv_heads, 24)?];
        let (Ok(inputs), Ok(numbers)) = (inputs.try_into(), numbers.try_into()) else { unreachable!("four of each") };
        Ok(Self { lengths: lengths.to_vec(), rows, spec, inputs, numbers, outputs })
    }

    /// out, dq, dk, dv by the formula.
    pub(super) fn expected(&self) -> [Vec<f64>; 4] {
        let [q, k, v, dout] = &self.numbers;
        let AttentionSpec { heads, kv_heads, head_dim: d, scale, .. } = self.spec;
        let mut results = [q, q, k, v].map(|like| vec![0f64; like.len()]);
        let [out, dq, dk, dv] = &mut results;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let add = |to: &mut [f64], from: &[f64], factor: f64| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
        };
        let mut start = 0;
        for &length in &self.lengths {
            for (head, query) in (0..heads).flat_map(|head| (start..start + length).map(move |query| (head, query))) {
                let own = (query * heads + head) * d..(query * heads + head + 1) * d;
                let of_key = |key: usize| {
                    let at = (key * kv_heads + head / (heads / kv_heads)) * d;
                    at..at + d
                };
                let scores: Vec<f64> =
                    (start..=query).map(|key| f64::from(scale) * dot(&q[own.clone()], &k[of_key(key)])).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                let p: Vec<f64> = scores.iter().map(|score| (score - most).exp() / sum).collect();
                for (key, &p) in (start..).zip(&p) {
                    add(&mut out[own.clone()], &v[of_key(key)], p);
                }
                let mean = dot(&dout[own.clone()], &out[own.clone()]);
                for (key, &p) in (start..).zip(&p) {
                    add(&mut dv[of_key(key)], &dout[own.clone()], p);
                    let ds = p * (dot(&dout[own.clone()], &v[of_key(key)]) - mean) * f64::from(scale);
                    add(&mut dq[own.clone()], &k[of_key(key)], ds);
                    add(&mut dk[of_key(key)], &q[own.clone()], ds);
                }
            }
            start += length;
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
