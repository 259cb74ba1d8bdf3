//! cuDNN's attention against the formula in f64. Where there is no GPU or no cuDNN, each test says that it is left out.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{AttentionRows, AttentionSpec, Result, empty};

use super::{
    super::{CudaGpu, capture, cuda, open},
    Cudnn, rounded,
};

fn cudnn(deterministic: bool) -> Option<(Device, Arc<CudaGpu>, Cudnn)> {
    let device = match open(0) {
        Ok(device) => device,
        Err(error) => {
            assert!(!Path::new("/dev/nvidiactl").exists(), "{error}");
            eprintln!("left out: {error}");
            return None;
        }
    };
    let Device::Cuda(candle) = &device else { panic!("{device:?} is no CUDA device") };
    let gpu = cuda(candle).unwrap();
    let cudnn = Cudnn::open(&gpu, deterministic).unwrap();
    if cudnn.is_none() {
        eprintln!("left out: no cuDNN here");
    }
    Some((device, gpu, cudnn?))
}

/// Tensors of one attention, and their numbers as rounded.
#[derive(Clone)]
struct Case {
    lengths: Vec<usize>,
    rows: AttentionRows,
    spec: AttentionSpec,
    /// q, k, v, dout.
    inputs: [Tensor; 4],
    numbers: [Vec<f64>; 4],
    /// out, dq, dk, dv.
    outputs: [Tensor; 4],
}

impl Case {
    fn new(lengths: &[usize], [heads, kv_heads, head_dim]: [usize; 3], dtype: DType, device: &Device) -> Result<Self> {
        let tokens: usize = lengths.iter().sum();
        let starts = lengths.iter().scan(0, |next, &n| Some(std::mem::replace(next, *next + n)));
        let table: Vec<u32> =
            starts.zip(lengths).flat_map(|(start, &n)| [start, n, start, n]).map(|n| n as u32).collect();
        let longest = lengths.iter().copied().max().unwrap_or_default();
        let rows = AttentionRows {
            table: Tensor::from_vec(table, (lengths.len(), 4), device)?,
            rows: lengths.len(),
            max_q_len: longest,
            max_kv_len: longest,
            packed: true,
        };
        let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
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

    /// Forward and backward; false where cuDNN does not serve.
    fn run(&self, gpu: &CudaGpu, cudnn: &Cudnn) -> Result<bool> {
        let ([q, k, v, dout], [out, dq, dk, dv]) = (&self.inputs, &self.outputs);
        let Some(stats) = cudnn.forward(gpu, [q, k, v], out, &self.rows, &self.spec)? else { return Ok(false) };
        cudnn.backward(gpu, dout, [q, k, v], out, &stats, [dq, dk, dv], &self.rows, &self.spec)
    }

    /// out, dq, dk, dv by the formula.
    fn expected(&self) -> [Vec<f64>; 4] {
        let [q, k, v, dout] = &self.numbers;
        let AttentionSpec { heads, kv_heads, head_dim: d, scale } = self.spec;
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

fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(values.into_iter().map(f64::from).collect())
}

/// The root of the squared error over that of the squares.
fn error(got: &[f64], expected: &[f64]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let of_error = squares(&mut got.iter().zip(expected).map(|(got, expected)| got - expected));
    (of_error / squares(&mut expected.iter().copied())).sqrt()
}

#[test]
fn packed_rows_are_those_of_the_formula() -> Result<()> {
    for deterministic in [false, true] {
        let Some((device, gpu, cudnn)) = cudnn(deterministic) else { return Ok(()) };
        for (heads, lengths) in [
            ([4, 2, 128], &[130, 1, 0, 64, 257][..]),
            ([6, 2, 64], &[300]),
            ([2, 2, 80], &[40, 128, 3]),
            ([8, 1, 96], &[77; 9]),
        ] {
            // an output is rounded once, from weights that were rounded once: half a step of the mantissa each
            for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F16, 5e-4)] {
                let case = Case::new(lengths, heads, dtype, &device)?;
                assert!(case.run(&gpu, &cudnn)?, "{heads:?} in {dtype:?}: cuDNN {} does not serve", cudnn.version());
                for ((name, got), expected) in
                    ["out", "dq", "dk", "dv"].into_iter().zip(&case.outputs).zip(case.expected())
                {
                    let error = error(&host(got)?, &expected);
                    assert!(error < tolerance, "{name} of {heads:?} in {dtype:?}: {error:e}, {deterministic}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_deterministic_backward_gives_the_same_bits() -> Result<()> {
    let Some((device, gpu, cudnn)) = cudnn(true) else { return Ok(()) };
    let case = Case::new(&[1000, 500, 700], [8, 4, 64], DType::BF16, &device)?;
    let run = || {
        assert!(case.run(&gpu, &cudnn)?);
        case.outputs.iter().map(host).collect::<Result<Vec<_>>>()
    };
    let first = run()?;
    for _ in 0..5 {
        assert_eq!(first, run()?);
    }
    Ok(())
}

#[test]
fn a_step_is_captured() -> Result<()> {
    let Some((device, gpu, cudnn)) = cudnn(true) else { return Ok(()) };
    let case = Case::new(&[200, 56], [4, 2, 64], DType::BF16, &device)?;
    let graph = capture(&device, || case.run(&gpu, &cudnn).map(|served| assert!(served)))?;
    let first = case.outputs.iter().map(host).collect::<Result<Vec<_>>>()?;
    // other results come between
    let mut other = case.clone();
    for input in &mut other.inputs {
        *input = input.contiguous()?.flip(&[0])?;
    }
    assert!(other.run(&gpu, &cudnn)?);
    assert_ne!(first[0], host(&case.outputs[0])?);
    graph.replay()?;
    assert_eq!(first, case.outputs.iter().map(host).collect::<Result<Vec<_>>>()?);
    Ok(())
}

#[test]
fn what_is_not_served_is_told_by_both() -> Result<()> {
    let Some((device, gpu, cudnn)) = cudnn(false) else { return Ok(()) };
    let mut unpacked = Case::new(&[5, 9], [2, 1, 64], DType::BF16, &device)?;
    unpacked.rows.packed = false;
    let single = Case::new(&[5, 9], [2, 1, 64], DType::F32, &device)?;
    let odd = Case::new(&[5, 9], [2, 1, 20], DType::BF16, &device)?;
    for case in [unpacked, single, odd] {
        let ([q, k, v, dout], [out, dq, dk, dv]) = (&case.inputs, &case.outputs);
        assert!(!case.run(&gpu, &cudnn)?);
        let stats = empty(1, DType::F32, &device)?;
        assert!(!cudnn.backward(&gpu, dout, [q, k, v], out, &stats, [dq, dk, dv], &case.rows, &case.spec)?);
    }
    Ok(())
}

#[test]
fn few_shapes_serve_all() {
    for n in 1..5000 {
        let up = rounded(n, 128);
        assert!(up >= n && up < n + n.max(512) / 4 && up.is_multiple_of(128), "{n}: {up}");
        assert!((n..=n + n / 4).contains(&rounded(n, 1)), "{n}");
    }
    let lengths: std::collections::HashSet<_> = (1..=8192).map(|n| rounded(n, 128)).collect();
    assert!(lengths.len() < 32, "{}", lengths.len());
}
