//! RMSNorm (Zhang and Sennrich, 2019), alone and with the residual addition before it, and its gradient.
//!
//! `y = weight * round(x * rstd)` with `rstd = 1 / sqrt(mean(x^2) + eps)`: where a norm `rounds_first`, as those of Llama-like models do, the
//! normalised value is rounded to the dtype of `x` before the product, else the product alone.

use rayon::prelude::*;

use crate::Element;
use crate::norm_row::{GROUP, Gradient, Normed, WeightGradient, add_squares, dot, factor, group, invert, squares};
use crate::simd::{column_sums, rows_per_task};
use crate::vector::{Body, Vector, run, sweep};

/// Normalises every row. `x`, `y` are `[rows, width]`, `weight` is `[width]`; `rstd` (`[rows]`) is kept for the backward.
pub fn rms_norm_forward<T: Element, W: Element>(
    x: &[T],
    weight: &[W],
    eps: f32,
    rounds_first: bool,
    width: usize,
    y: &mut [T],
    rstd: &mut [f32],
) {
    check("rms_norm_forward", x.len(), width, weight.len(), rstd.len());
    assert_eq!(x.len(), y.len(), "rms_norm_forward: y");
    match rounds_first {
        true => forward::<T, W, true>(x, weight, eps, y, rstd),
        false => forward::<T, W, false>(x, weight, eps, y, rstd),
    }
}

fn forward<T: Element, W: Element, const ROUNDS: bool>(x: &[T], weight: &[W], eps: f32, y: &mut [T], rstd: &mut [f32]) {
    let width = weight.len();
    let rows = rows_per_task(width);
    let forward = |x, y, rstd| run(Forward::<T, W, ROUNDS> { x, weight, eps, y, rstd });
    if rstd.len() <= rows {
        return forward(x, y, rstd);
    }
    x.par_chunks(rows * width)
        .zip(y.par_chunks_mut(rows * width))
        .zip(rstd.par_chunks_mut(rows))
        .for_each(|((x, y), rstd)| forward(x, y, rstd));
}

struct Forward<'a, T, W, const ROUNDS: bool> {
    x: &'a [T],
    weight: &'a [W],
    eps: f32,
    y: &'a mut [T],
    rstd: &'a mut [f32],
}

impl<T: Element, W: Element, const ROUNDS: bool> Body for Forward<'_, T, W, ROUNDS> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, eps, .. } = self;
        let width = weight.len();
        let rows = group(width);
        let groups = self.x.chunks(rows * width).zip(self.y.chunks_mut(rows * width)).zip(self.rstd.chunks_mut(rows));
        for ((x, y), rstd) in groups {
            for (x, sum) in x.chunks_exact(width).zip(&mut *rstd) {
                *sum = squares::<V, T>(x);
            }
            invert(rstd, width, eps);
            for ((x, y), &mut rstd) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd) {
                sweep::<V>(width, &mut Normed::<T, W, ROUNDS> { x, weight, rstd, y });
            }
        }
    }
}

/// `sum = x + residual`, rounded to the dtype, and `y = rms_norm(sum)`. Shapes as in [`rms_norm_forward`].
#[allow(clippy::too_many_arguments)]
pub fn add_rms_norm_forward<T: Element, W: Element>(
    x: &[T],
    residual: &[T],
    weight: &[W],
    eps: f32,
    rounds_first: bool,
    width: usize,
    sum: &mut [T],
    y: &mut [T],
    rstd: &mut [f32],
) {
    check("add_rms_norm_forward", x.len(), width, weight.len(), rstd.len());
    for (name, len) in [("residual", residual.len()), ("sum", sum.len()), ("y", y.len())] {
        assert_eq!(x.len(), len, "add_rms_norm_forward: {name}");
    }
    match rounds_first {
        true => add_forward::<T, W, true>(x, residual, weight, eps, sum, y, rstd),
        false => add_forward::<T, W, false>(x, residual, weight, eps, sum, y, rstd),
    }
}

fn add_forward<T: Element, W: Element, const ROUNDS: bool>(
    x: &[T],
    residual: &[T],
    weight: &[W],
    eps: f32,
    sum: &mut [T],
    y: &mut [T],
    rstd: &mut [f32],
) {
    let width = weight.len();
    let rows = rows_per_task(width);
    let forward =
        |x, residual, sum, y, rstd| run(AddForward::<T, W, ROUNDS> { x, residual, weight, eps, sum, y, rstd });
    if rstd.len() <= rows {
        return forward(x, residual, sum, y, rstd);
    }
    let inputs = x.par_chunks(rows * width).zip(residual.par_chunks(rows * width));
    let outputs = sum.par_chunks_mut(rows * width).zip(y.par_chunks_mut(rows * width));
    inputs
        .zip(outputs)
        .zip(rstd.par_chunks_mut(rows))
        .for_each(|(((x, residual), (sum, y)), rstd)| forward(x, residual, sum, y, rstd));
}

struct AddForward<'a, T, W, const ROUNDS: bool> {
    x: &'a [T],
    residual: &'a [T],
    weight: &'a [W],
    eps: f32,
    sum: &'a mut [T],
    y: &'a mut [T],
    rstd: &'a mut [f32],
}

impl<T: Element, W: Element, const ROUNDS: bool> Body for AddForward<'_, T, W, ROUNDS> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, eps, .. } = self;
        let width = weight.len();
        let rows = group(width);
        let inputs = self.x.chunks(rows * width).zip(self.residual.chunks(rows * width));
        let outputs = self.sum.chunks_mut(rows * width).zip(self.y.chunks_mut(rows * width));
        for (((x, residual), (sum, y)), rstd) in inputs.zip(outputs).zip(self.rstd.chunks_mut(rows)) {
            let inputs = x.chunks_exact(width).zip(residual.chunks_exact(width));
            for (((x, residual), sum), squares) in inputs.zip(sum.chunks_exact_mut(width)).zip(&mut *rstd) {
                *squares = add_squares::<V, T>(x, residual, sum);
            }
            invert(rstd, width, eps);
            for ((x, y), &mut rstd) in sum.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd) {
                sweep::<V>(width, &mut Normed::<T, W, ROUNDS> { x, weight, rstd, y });
            }
        }
    }
}

/// The gradient of [`rms_norm_forward`] (roundings count as nothing), and with `dsum` that of [`add_rms_norm_forward`] for both addends.
///
/// With `n = x * rstd` and `g = dy * weight`: `dx = rstd * (g - n * mean(g * n)) + dsum`. `x` is what was normalised (the
/// sum, where there was an addition). `dweight` (`[width]`) grows by the sum of `dy * n` over the rows.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward<T: Element, W: Element>(
    dy: &[T],
    x: &[T],
    weight: &[W],
    rstd: &[f32],
    rounds_first: bool,
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
        column_sums(rstd.len(), dweight, |row, rows, sums| {
            let range = row * width..(row + rows) * width;
            let (dy, x, rstd) = (&dy[range.clone()], &x[range], &rstd[row..row + rows]);
            match rounds_first {
                true => run(WeightRows::<T, true> { dy, x, rstd, sums }),
                false => run(WeightRows::<T, false> { dy, x, rstd, sums }),
            }
        });
    }
    let rows = rows_per_task(width);
    let backward = |(i, dx): (usize, &mut [T])| {
        let range = i * rows * width..i * rows * width + dx.len();
        let rstd = &rstd[i * rows..i * rows + dx.len() / width];
        let dsum = dsum.map(|dsum| &dsum[range.clone()]);
        run(Backward { dy: &dy[range.clone()], x: &x[range], weight, rstd, dsum, dx });
    };
    if rstd.len() <= rows {
        return backward((0, dx));
    }
    dx.par_chunks_mut(rows * width).enumerate().for_each(backward);
}

struct Backward<'a, T, W> {
    dy: &'a [T],
    x: &'a [T],
    weight: &'a [W],
    rstd: &'a [f32],
    dsum: Option<&'a [T]>,
    dx: &'a mut [T],
}

impl<T: Element, W: Element> Body for Backward<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, dsum, .. } = self;
        let width = weight.len();
        let rows = group(width);
        let mut factors = [0.0; GROUP];
        let inputs = self.dy.chunks(rows * width).zip(self.x.chunks(rows * width)).zip(self.rstd.chunks(rows));
        for (i, (((dy, x), rstd), dx)) in inputs.zip(self.dx.chunks_mut(rows * width)).enumerate() {
            let pairs = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(rstd);
            for (((dy, x), &rstd), kept) in pairs.clone().zip(&mut factors) {
                *kept = factor(dot::<V, T, W>(dy, x, weight), width, rstd);
            }
            let results = dx.chunks_exact_mut(width).zip(factors);
            for (row, (((dy, x), &rstd), (dx, factor))) in pairs.zip(results).enumerate() {
                let first = (i * rows + row) * width;
                let dsum = dsum.map(|dsum| &dsum[first..first + width]);
                sweep::<V>(width, &mut Gradient { dy, x, weight, rstd, factor, dsum, dx });
            }
        }
    }
}

struct WeightRows<'a, T, const ROUNDS: bool> {
    dy: &'a [T],
    x: &'a [T],
    rstd: &'a [f32],
    sums: &'a mut [f32],
}

impl<T: Element, const ROUNDS: bool> Body for WeightRows<'_, T, ROUNDS> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let width = self.sums.len();
        for ((dy, x), &rstd) in self.dy.chunks_exact(width).zip(self.x.chunks_exact(width)).zip(self.rstd) {
            sweep::<V>(width, &mut WeightGradient::<T, ROUNDS> { dy, x, rstd, sums: &mut *self.sums });
        }
    }
}

fn check(name: &str, len: usize, width: usize, weight: usize, rstd: usize) {
    assert!(width > 0 && len.is_multiple_of(width), "{name}: {len} elements in rows of {width}");
    assert_eq!(weight, width, "{name}: weight");
    assert_eq!(rstd, len / width, "{name}: rstd");
}
