//! RMSNorm (Zhang and Sennrich, 2019), alone and with the residual addition before it, and its gradient.
//!
//! `y = weight * round(x * rstd)` with `rstd = 1 / sqrt(mean(x^2) + eps)`: the normalised value is rounded to the
//! dtype of `x` before the product, as Llama-like models do.

use rayon::prelude::*;

use crate::Element;
use crate::simd::{column_sums, fold2, fold3, rows_per_task, simd_fn};

/// Normalises every row. `x`, `y` are `[rows, width]`, `weight` is `[width]`; `rstd` (`[rows]`) is kept for the backward.
pub fn rms_norm_forward<T: Element, W: Element>(
    x: &[T],
    weight: &[W],
    eps: f32,
    width: usize,
    y: &mut [T],
    rstd: &mut [f32],
) {
    check("rms_norm_forward", x.len(), width, weight.len(), rstd.len());
    assert_eq!(x.len(), y.len(), "rms_norm_forward: y");
    let rows = rows_per_task(width);
    if rstd.len() <= rows {
        return forward(x, weight, eps, width, y, rstd);
    }
    x.par_chunks(rows * width)
        .zip(y.par_chunks_mut(rows * width))
        .zip(rstd.par_chunks_mut(rows))
        .for_each(|((x, y), rstd)| forward(x, weight, eps, width, y, rstd));
}

/// `sum = x + residual`, rounded to the dtype, and `y = rms_norm(sum)`. Shapes as in [`rms_norm_forward`].
#[allow(clippy::too_many_arguments)]
pub fn add_rms_norm_forward<T: Element, W: Element>(
    x: &[T],
    residual: &[T],
    weight: &[W],
    eps: f32,
    width: usize,
    sum: &mut [T],
    y: &mut [T],
    rstd: &mut [f32],
) {
    check("add_rms_norm_forward", x.len(), width, weight.len(), rstd.len());
    for (name, len) in [("residual", residual.len()), ("sum", sum.len()), ("y", y.len())] {
        assert_eq!(x.len(), len, "add_rms_norm_forward: {name}");
    }
    let rows = rows_per_task(width);
    let run = |x: &[T], residual: &[T], sum: &mut [T], y: &mut [T], rstd: &mut [f32]| {
        add(x, residual, sum);
        forward(sum, weight, eps, width, y, rstd);
    };
    if rstd.len() <= rows {
        return run(x, residual, sum, y, rstd);
    }
    let inputs = x.par_chunks(rows * width).zip(residual.par_chunks(rows * width));
    let outputs = sum.par_chunks_mut(rows * width).zip(y.par_chunks_mut(rows * width));
    inputs
        .zip(outputs)
        .zip(rstd.par_chunks_mut(rows))
        .for_each(|(((x, residual), (sum, y)), rstd)| run(x, residual, sum, y, rstd));
}

simd_fn! {
    fn add['a; T](x: &'a [T], residual: &'a [T], sum: &'a mut [T]) -> () {
        for ((sum, x), r) in sum.iter_mut().zip(x).zip(residual) {
            *sum = T::from_f32(x.to_f32() + r.to_f32());
        }
    }
}

simd_fn! {
    fn forward['a; T, W](x: &'a [T], weight: &'a [W], eps: f32, width: usize, y: &'a mut [T], rstd: &'a mut [f32]) -> () {
        for ((x, y), rstd) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd) {
            let squares = fold2(x, x, |sum, a, _| a.mul_add(a, sum));
            let scale = 1.0 / (squares / width as f32 + eps).sqrt();
            *rstd = scale;
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = T::from_f32(T::from_f32(x.to_f32() * scale).to_f32() * w.to_f32());
            }
        }
    }
}

/// The gradient of [`rms_norm_forward`], and with `dsum` that of [`add_rms_norm_forward`] for both addends.
///
/// With `n = x * rstd` and `g = dy * weight`: `dx = rstd * (g - n * mean(g * n)) + dsum`. `x` is what was normalised (the
/// sum, where there was an addition). `dweight` (`[width]`) grows by the sum of `dy * n` over the rows.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward<T: Element, W: Element>(
    dy: &[T],
    x: &[T],
    weight: &[W],
    rstd: &[f32],
    width: usize,
    dsum: Option<&[T]>,
    dx: &mut [T],
    dweight: Option<&mut [f32]>,
) {
    check("rms_norm_backward", x.len(), width, weight.len(), rstd.len());
    assert_eq!(x.len(), dy.len(), "rms_norm_backward: dy");
    assert_eq!(x.len(), dx.len(), "rms_norm_backward: dx");
    assert!(dsum.is_none_or(|dsum| dsum.len() == x.len()), "rms_norm_backward: dsum");
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), width, "rms_norm_backward: dweight");
        column_sums(rstd.len(), dweight, |row, rows, partial| {
            let range = row * width..(row + rows) * width;
            weight_gradient(&dy[range.clone()], &x[range], &rstd[row..row + rows], partial);
        });
    }
    let rows = rows_per_task(width);
    let run = |(i, dx): (usize, &mut [T])| {
        let range = i * rows * width..i * rows * width + dx.len();
        let rstd = &rstd[i * rows..i * rows + dx.len() / width];
        backward(&dy[range.clone()], &x[range.clone()], weight, rstd, width, dx);
        if let Some(dsum) = dsum {
            crate::elementwise::add_slice(dx, &dsum[range]);
        }
    };
    if rstd.len() <= rows {
        return run((0, dx));
    }
    dx.par_chunks_mut(rows * width).enumerate().for_each(run);
}

simd_fn! {
    fn backward['a; T, W](
        dy: &'a [T], x: &'a [T], weight: &'a [W], rstd: &'a [f32], width: usize, dx: &'a mut [T],
    ) -> () {
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(rstd);
        for (((dy, x), dx), &scale) in rows {
            let sum = fold3(dy, x, weight, |sum, dy, x, w| (dy * w).mul_add(x, sum));
            // mean(g n) * rstd * rstd, the factor of x.
            let factor = sum / width as f32 * scale * scale * scale;
            for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                let g = dy.to_f32() * w.to_f32();
                *dx = T::from_f32(g * scale - x.to_f32() * factor);
            }
        }
    }
}

simd_fn! {
    fn weight_gradient['a; T](dy: &'a [T], x: &'a [T], rstd: &'a [f32], sums: &'a mut [f32]) -> () {
        let width = sums.len();
        for ((dy, x), &scale) in dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(rstd) {
            for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                // The factor that the weight saw: rounded, as in the forward.
                *sum += dy.to_f32() * T::from_f32(x.to_f32() * scale).to_f32();
            }
        }
    }
}

fn check(name: &str, len: usize, width: usize, weight: usize, rstd: usize) {
    assert!(width > 0 && len.is_multiple_of(width), "{name}: {len} elements in rows of {width}");
    assert_eq!(weight, width, "{name}: weight");
    assert_eq!(rstd, len / width, "{name}: rstd");
}
