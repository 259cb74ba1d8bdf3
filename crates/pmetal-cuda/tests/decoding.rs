//! Products of one row and attention of one query on a CUDA device against f64 on the host. Without the feature or a GPU from Hopper on each
//! test says that it is left out.

mod common;

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{AttentionSpec, Decoding, Error, Gpu, Reach, Result, RowAttention, RowProduct, RowStep};

use self::common::{gpu, host, numbers};

/// Dtypes, and how far a result may be from the reference.
const DTYPES: [(DType, f64); 3] = [(DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 8e-3)];

fn spec(heads: usize, kv_heads: usize, head_dim: usize, scale: f32) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, scale, reach: Reach::All, softcap: None }
}

/// What decodes there; none before Hopper.
fn decoding<'a>(gpu: &'a dyn Gpu, dtype: DType, spec: &AttentionSpec, width: usize) -> Option<&'a dyn Decoding> {
    let decoding = gpu.decoding()?;
    let takes = decoding.decodes(dtype, spec, &[width]).unwrap();
    if !takes {
        eprintln!("left out: no kernels for {dtype:?}");
    }
    takes.then_some(decoding)
}

/// Numbers in -1 .. 1 on the device, the same in every run, and as they were rounded.
fn matrix(dims: (usize, usize), dtype: DType, seed: u64, device: &Device) -> Result<(Tensor, Vec<f64>)> {
    let tensor = Tensor::from_vec(numbers(dims.0 * dims.1, seed), dims, device)?.to_dtype(dtype)?;
    Ok((tensor.clone(), host(&tensor)?))
}

fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    square(&mut got.iter().zip(want).map(|(g, w)| g - w)) / square(&mut want.iter().copied())
}

fn normed(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// Rows of each weight, width, columns behind each row that are not its own; then whether there is a norm, a bias, a residual, a gate.
type Case = (&'static [usize], usize, usize, [bool; 4]);

fn check_product(decoding: &dyn Decoding, device: &Device, case: &Case, dtype: DType, tolerance: f64) -> Result<()> {
    let &(sizes, width, spare, [has_norm, has_bias, has_residual, gated]) = case;
    let rows: usize = sizes.iter().sum();
    let n = if gated { rows / 2 } else { rows };
    let (parent, all) = matrix((rows, width + spare), dtype, 1, device)?;
    let (x, x_host) = matrix((1, width), dtype, 2, device)?;
    let (norm, norm_host) = matrix((1, width), dtype, 3, device)?;
    let (bias, bias_host) = matrix((1, rows), dtype, 4, device)?;
    let (residual, residual_host) = matrix((1, n), dtype, 5, device)?;
    let mut first = 0;
    let weights = sizes.iter().map(|&size| {
        first += size;
        parent.narrow(0, first - size, size)?.narrow(1, 0, width)
    });
    let weights = weights.collect::<candle_core::Result<Vec<_>>>()?;
    let eps = 1e-5;
    let x_host = if has_norm { normed(&x_host, &norm_host, f64::from(eps)) } else { x_host };
    let row = |i: usize| {
        let weight = &all[i * (width + spare)..][..width];
        let sum: f64 = weight.iter().zip(&x_host).map(|(w, x)| w * x).sum();
        sum + if has_bias { bias_host[i] } else { 0.0 }
    };
    let want = (0..n).map(|i| {
        let y = if gated { row(i) / (1.0 + (-row(i)).exp()) * row(i + n) } else { row(i) };
        y + if has_residual { residual_host[i] } else { 0.0 }
    });
    let want: Vec<f64> = want.collect();
    for result in [dtype, DType::F32] {
        let y = (Tensor::ones((1, n), DType::F32, device)? * f64::NAN)?.to_dtype(result)?;
        let step = RowStep::Product(RowProduct {
            weights: weights.iter().collect(),
            x: &x,
            norm: has_norm.then_some((&norm, eps)),
            bias: has_bias.then_some(&bias),
            residual: has_residual.then_some(&residual),
            gated,
            y: &y,
        });
        // from the second on it begins while the one before is at work
        decoding.record(&[step.clone(), step.clone(), step])?.replay()?;
        let apart = distance(&host(&y)?, &want);
        assert!(apart <= tolerance, "{case:?} of {dtype:?} in {result:?}: {apart}");
    }
    Ok(())
}

#[test]
fn products_of_one_row() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let spec = spec(2, 1, 64, 1.0);
    let cases: [Case; 7] = [
        (&[1], 8, 0, [false; 4]),
        (&[5], 72, 16, [false, true, true, false]),
        (&[300, 100, 77], 4096, 16, [true, true, false, false]),
        (&[301], 14336, 0, [false, false, true, false]),
        (&[777, 777], 1032, 8, [true, false, false, true]),
        (&[40, 40], 2048, 0, [true, true, true, true]),
        (&[2000, 333], 2056, 0, [true, false, true, false]),
    ];
    for (dtype, tolerance) in DTYPES {
        let Some(decoding) = decoding(&*gpu, dtype, &spec, 14336) else { return Ok(()) };
        for case in &cases {
            check_product(decoding, &device, case, dtype, tolerance)?;
        }
    }
    Ok(())
}

#[test]
fn operands_that_do_not_fit_are_refused() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let spec = spec(2, 1, 64, 1.0);
    let Some(decoding) = decoding(&*gpu, DType::F32, &spec, 64) else { return Ok(()) };
    let zeros = |rows: usize, width: usize| Tensor::zeros((rows, width), DType::F32, &device);
    let (weight, x, y) = (zeros(8, 64)?, zeros(1, 64)?, zeros(1, 8)?);
    let (narrow, short, odd) = (zeros(8, 60)?, zeros(1, 7)?, zeros(8, 66)?.narrow(1, 1, 64)?);
    let fits =
        || RowProduct { weights: vec![&weight], x: &x, norm: None, bias: None, residual: None, gated: false, y: &y };
    let record = |product| decoding.record(&[RowStep::Product(product)]).map(|_| ());
    record(fits())?;
    for refused in [
        RowProduct { weights: vec![], ..fits() },
        RowProduct { weights: vec![&narrow], ..fits() },
        RowProduct { weights: vec![&odd], ..fits() },
        RowProduct { gated: true, ..fits() },
        RowProduct { bias: Some(&short), ..fits() },
        RowProduct { residual: Some(&short), ..fits() },
        RowProduct { norm: Some((&short, 1e-5)), ..fits() },
        RowProduct { y: &short, ..fits() },
    ] {
        assert!(matches!(record(refused.clone()), Err(Error::Buffer { .. })), "{refused:?}");
    }
    Ok(())
}

const CAPACITY: usize = 1000;

/// A head normalised where there is a norm, and turned by the angles of a place.
fn turned(x: &[f64], norm: Option<&[f64]>, eps: f64, inv_freq: &[f64], position: usize) -> Vec<f64> {
    let x = norm.map_or(x.to_vec(), |norm| normed(x, norm, eps));
    let half = x.len() / 2;
    let pair = |i: usize| (x[i], x[i + half], (position as f64 * inv_freq[i]).sin_cos());
    let low = (0..half).map(|i| {
        let (a, b, (sin, cos)) = pair(i);
        a * cos - b * sin
    });
    let high = (0..half).map(|i| {
        let (a, b, (sin, cos)) = pair(i);
        b * cos + a * sin
    });
    low.chain(high).collect()
}

fn check_attention(
    decoding: &dyn Decoding,
    device: &Device,
    spec: &AttentionSpec,
    (position, has_norms): (usize, bool),
    (dtype, tolerance): (DType, f64),
) -> Result<()> {
    let &AttentionSpec { heads, kv_heads, head_dim: d, scale, .. } = spec;
    let (qkv, qkv_host) = matrix((1, (heads + 2 * kv_heads) * d), dtype, 1, device)?;
    let (keys, mut keys_host) = matrix((CAPACITY, kv_heads * d), dtype, 2, device)?;
    let (values, mut values_host) = matrix((CAPACITY, kv_heads * d), dtype, 3, device)?;
    let norms = [matrix((1, d), dtype, 4, device)?, matrix((1, d), dtype, 5, device)?];
    let inv_freq: Vec<f32> = (0..d / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / d as f32)).collect();
    let eps = 1e-6;
    let out = (Tensor::ones((1, heads * d), DType::F32, device)? * f64::NAN)?.to_dtype(dtype)?;
    let step = RowStep::Attention(RowAttention {
        qkv: &qkv,
        head_norms: has_norms.then_some([&norms[0].0, &norms[1].0]),
        eps,
        inv_freq: &Tensor::new(inv_freq.as_slice(), device)?,
        position: &Tensor::new(&[position as u32], device)?,
        keys: &keys,
        values: &values,
        out: &out,
        spec: *spec,
    });
    decoding.record(&[step])?.replay()?;

    let inv_freq: Vec<f64> = inv_freq.into_iter().map(f64::from).collect();
    let norm_of = |which: usize| has_norms.then_some(norms[which].1.as_slice());
    let head = |i: usize, which| turned(&qkv_host[i * d..][..d], norm_of(which), f64::from(eps), &inv_freq, position);
    for head_of_keys in 0..kv_heads {
        let place = (position * kv_heads + head_of_keys) * d;
        keys_host[place..][..d].copy_from_slice(&head(heads + head_of_keys, 1));
        values_host[place..][..d].copy_from_slice(&qkv_host[(heads + kv_heads + head_of_keys) * d..][..d]);
    }
    let mut want = Vec::with_capacity(heads * d);
    for i in 0..heads {
        let query = head(i, 0);
        let of = |cache: &[f64], key: usize, at: usize| cache[(key * kv_heads + i * kv_heads / heads) * d + at];
        let score = |key| f64::from(scale) * (0..d).map(|at| query[at] * of(&keys_host, key, at)).sum::<f64>();
        let seen = spec.reach.first(position)..=position;
        let weights: Vec<(usize, f64)> = seen.map(|key| (key, score(key).exp())).collect();
        let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        want.extend(
            (0..d).map(|at| weights.iter().map(|&(key, weight)| weight * of(&values_host, key, at)).sum::<f64>() / sum),
        );
    }
    let what = format!("{spec:?} at {position} of {dtype:?}, norms {has_norms}");
    // every place but the new one is as it was
    for (name, got, want) in [("out", &out, &want), ("keys", &keys, &keys_host), ("values", &values, &values_host)] {
        let apart = distance(&host(got)?, want);
        assert!(apart <= tolerance, "{name} of {what}: {apart}");
    }
    Ok(())
}

#[test]
fn attention_of_one_query() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    // each is compiled
    let [f32, f16, bf16] = DTYPES;
    let cases = [
        ((8, 2, 128), f32),
        ((8, 2, 128), bf16),
        ((9, 3, 64), f32),
        ((8, 1, 128), bf16),
        ((2, 2, 16), f16),
        ((4, 1, 256), bf16),
    ];
    for ((heads, kv_heads, head_dim), dtype) in cases {
        let spec = spec(heads, kv_heads, head_dim, 1.0 / (head_dim as f32).sqrt());
        let Some(decoding) = decoding(&*gpu, dtype.0, &spec, 64) else { return Ok(()) };
        for (position, has_norms) in
            [(0, false), (1, true), (8, false), (130, true), (639, false), (CAPACITY - 1, true)]
        {
            check_attention(decoding, &device, &spec, (position, has_norms), dtype)?;
        }
    }
    Ok(())
}

#[test]
fn attention_of_one_query_over_some_of_the_keys() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    for (reach, (heads, kv_heads, head_dim)) in [
        (Reach::Window(1), (8, 2, 128)),
        (Reach::Window(100), (8, 2, 128)),
        (Reach::Chunk(64), (9, 3, 64)),
        (Reach::Chunk(131), (9, 3, 64)),
    ] {
        let spec = AttentionSpec { reach, ..spec(heads, kv_heads, head_dim, 0.1) };
        let Some(decoding) = decoding(&*gpu, DType::BF16, &spec, 64) else { return Ok(()) };
        for position in [0, 63, 64, 99, 130, 131, 639, CAPACITY - 1] {
            check_attention(decoding, &device, &spec, (position, false), DTYPES[2])?;
        }
    }
    Ok(())
}

#[test]
fn steps_follow_one_another_and_are_done_again() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let spec = spec(2, 1, 64, 1.0);
    for width in [64, 2048] {
        let Some(decoding) = decoding(&*gpu, DType::F32, &spec, width) else { return Ok(()) };
        let (weight, w) = matrix((width, width), DType::F32, 1, &device)?;
        let (x, mut want) = matrix((1, width), DType::F32, 2, &device)?;
        let y = Tensor::zeros((1, width), DType::F32, &device)?;
        let norm = weight.narrow(0, 0, 1)?;
        let step = |x, y| {
            let norm = Some((&norm, 1e-5));
            RowStep::Product(RowProduct {
                weights: vec![&weight],
                x,
                norm,
                bias: None,
                residual: None,
                gated: false,
                y,
            })
        };
        let recording = decoding.record(&[step(&x, &y), step(&y, &x), step(&x, &y), step(&y, &x)])?;
        for _ in 0..3 {
            recording.replay()?;
        }
        for _ in 0..12 {
            let x = normed(&want, &w[..width], 1e-5);
            want = w.chunks(width).map(|row| row.iter().zip(&x).map(|(w, x)| w * x).sum()).collect();
        }
        let apart = distance(&host(&x)?, &want);
        assert!(apart < 1e-3, "{width}: {apart}");
    }
    Ok(())
}
