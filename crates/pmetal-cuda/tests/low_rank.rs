//! Low-rank products on a CUDA device against f64 on the host. Without the feature or a GPU the test says that it is left out.

mod common;

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gpu, LowRankBackward, LowRankMember, Result, low_rank_forward};

use self::common::{gpu, host, numbers};

/// A matrix of numbers in -1 .. 1 on the device, the same in every run, and as it was rounded.
fn matrix(dims: (usize, usize), dtype: DType, seed: u64, device: &Device) -> Result<(Tensor, Vec<f64>)> {
    let tensor = Tensor::from_vec(numbers(dims.0 * dims.1, seed), dims, device)?.to_dtype(dtype)?;
    Ok((tensor.clone(), host(&tensor)?))
}

/// A member's outputs, its ranks and how many of them are its adapter's.
type Size = (usize, usize, usize);

/// How far `got` is from what `expected` says of each place, relative to the norm of the latter.
fn distance(got: &[f64], expected: impl Fn(usize) -> f64) -> f64 {
    let (mut apart, mut norm) = (0.0, 0.0);
    for (i, &got) in got.iter().enumerate() {
        let expected = expected(i);
        apart += (got - expected).powi(2);
        norm += expected.powi(2);
    }
    (apart / norm).sqrt()
}

/// `[[W, B], [A, ·]]` of a group, where `B` is zeros but for the members' own, and as it was rounded.
fn weights(width: usize, sizes: &[Size], dtype: DType, device: &Device) -> Result<(Tensor, Vec<f64>)> {
    let outputs: usize = sizes.iter().map(|size| size.0).sum();
    let ranks: usize = sizes.iter().map(|size| size.1).sum();
    let (_, mut w) = matrix((outputs + ranks, width + ranks), DType::F32, 3, &Device::Cpu)?;
    let (mut first_output, mut first_rank) = (0, 0);
    for &(n, r, _) in sizes {
        for row in w.chunks_mut(width + ranks).skip(first_output).take(n) {
            row[width..width + first_rank].fill(0.0);
            row[width + first_rank + r..].fill(0.0);
        }
        (first_output, first_rank) = (first_output + n, first_rank + r);
    }
    let w = Tensor::from_vec(w.into_iter().map(|w| w as f32).collect(), (outputs + ranks, width + ranks), device)?;
    let w = w.to_dtype(dtype)?;
    Ok((w.clone(), host(&w)?))
}

fn check(gpu: &dyn Gpu, device: &Device, tokens: usize, width: usize, sizes: &[Size], dtype: DType) -> Result<()> {
    let outputs: usize = sizes.iter().map(|size| size.0).sum();
    let ranks: usize = sizes.iter().map(|size| size.1).sum();
    let (x_pitch, dy_pitch) = (width + ranks, outputs + ranks);
    let (x_all, x) = matrix((tokens, x_pitch), dtype, 1, device)?;
    let (dy_all, dy) = matrix((tokens, dy_pitch), dtype, 2, device)?;
    let (weights, w) = weights(width, sizes, dtype, device)?;
    let mut gradients = Vec::new();
    for &(n, _, r) in sizes {
        gradients.push((matrix((r, width), DType::F32, 4, device)?, matrix((n, r), DType::F32, 5, device)?));
    }
    let (mut first_output, mut first_rank) = (0, 0);
    let mut members = Vec::new();
    for (i, (&(n, r, _), ((da, _), (db, _)))) in sizes.iter().zip(&gradients).enumerate() {
        members.push(LowRankMember {
            outputs: first_output..first_output + n,
            ranks: first_rank..first_rank + r,
            scale: if i == 0 { 0.5 } else { 1.5 },
            da: Some((da, i == 1)),
            db: Some((db, i == 0)),
        });
        (first_output, first_rank) = (first_output + n, first_rank + r);
    }
    let columns = |of: &Tensor, first, count| of.narrow(1, first, count);
    let work = LowRankBackward {
        joined_da: None,
        dy: &columns(&dy_all, 0, outputs)?,
        b: &columns(&weights, width, ranks)?.narrow(0, 0, outputs)?,
        x: &columns(&x_all, 0, width)?,
        u: &columns(&x_all, width, ranks)?,
        du: &columns(&dy_all, outputs, ranks)?,
        members: &members,
    };
    low_rank_forward(gpu, work.x, &columns(&weights, 0, width)?.narrow(0, outputs, ranks)?, work.u, &members)?;
    gpu.low_rank_backward(&work)?;

    let what = format!("{tokens} tokens, {width} wide, {sizes:?}, {dtype:?}");
    let (x_after, dy_after) = (host(&x_all)?, host(&dy_all)?);
    let sum = |count: usize, term: &dyn Fn(usize) -> f64| (0..count).map(term).sum::<f64>();
    let rounding = if dtype == DType::F32 { 1e-5 } else { 4e-3 };
    for (member, ((da, da_before), (db, db_before))) in members.iter().zip(&gradients) {
        let (scale, first) = (f64::from(member.scale), member.ranks.start);
        let own = |of: &[f64], pitch: usize, from: usize, count: usize| -> Vec<f64> {
            (0..tokens).flat_map(|t| of[t * pitch + from..][..count].to_vec()).collect()
        };
        let r = member.ranks.len();
        let u = own(&x_after, x_pitch, width + first, r);
        let expected_u = |i: usize| {
            let (t, row) = (i / r, outputs + first + i % r);
            scale * sum(width, &|k| x[t * x_pitch + k] * w[row * x_pitch + k])
        };
        assert!(distance(&u, expected_u) < rounding, "u of {:?}: {what}", member.ranks);
        let du = own(&dy_after, dy_pitch, outputs + first, r);
        let expected_du = |i: usize| {
            let (t, column) = (i / r, width + first + i % r);
            scale
                * sum(member.outputs.len(), &|n| {
                    let n = member.outputs.start + n;
                    dy[t * dy_pitch + n] * w[n * x_pitch + column]
                })
        };
        assert!(distance(&du, expected_du) < rounding, "du of {:?}: {what}", member.ranks);
        let used = da.dim(0)?;
        let kept = |gradient: Option<(&Tensor, bool)>, before: &[f64], i: usize| match gradient {
            Some((_, true)) => 0.0,
            _ => before[i],
        };
        let expected_db = |i: usize| {
            let (n, rank) = (member.outputs.start + i / used, i % used);
            kept(member.db, db_before, i) + sum(tokens, &|t| dy[t * dy_pitch + n] * u[t * r + rank])
        };
        assert!(distance(&host(db)?, expected_db) < 1e-5, "dB of {:?}: {what}", member.ranks);
        let expected_da = |i: usize| {
            let (rank, k) = (i / width, i % width);
            kept(member.da, da_before, i) + sum(tokens, &|t| du[t * r + rank] * x[t * x_pitch + k])
        };
        assert!(distance(&host(da)?, expected_da) < 1e-5, "dA of {:?}: {what}", member.ranks);
    }
    for t in 0..tokens {
        assert_eq!(x_after[t * x_pitch..][..width], x[t * x_pitch..][..width], "x: {what}");
        assert_eq!(dy_after[t * dy_pitch..][..outputs], dy[t * dy_pitch..][..outputs], "dy: {what}");
    }
    Ok(())
}

#[test]
fn low_rank_products_are_those_of_the_host() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let groups: [&[Size]; 6] = [
        &[(64, 16, 16), (640, 16, 5), (128, 16, 16)],
        &[(3136, 16, 16)],
        &[(320, 64, 61), (64, 64, 64)],
        &[(64, 128, 100)],
        &[(128, 32, 32), (640, 32, 20)],
        // no multiple of 64
        &[(77, 16, 7)],
    ];
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for sizes in groups {
            for (tokens, width) in [(520, 128), (777, 192), (33, 64), (600, 77)] {
                check(&*gpu, &device, tokens, width, sizes, dtype)?;
            }
        }
    }
    Ok(())
}
