//! One row's RMSNorm and its gradient, for the kernels of norms.

use crate::Element;
use crate::vector::{Step, Term, Vector, total};

/// The most rows of a group.
pub(crate) const GROUP: usize = 16;

/// Rows whose sums are all found before the first of them is normalised: a row's sum, root and quotient wait for one another, those of
/// different rows do not. The rows stay in the first cache in between.
#[inline(always)]
pub(crate) fn group(width: usize) -> usize {
    (4096 / width).clamp(1, GROUP)
}

/// Sums of squares become `1 / sqrt(squares / width + eps)`.
#[inline(always)]
pub(crate) fn invert(squares: &mut [f32], width: usize, eps: f32) {
    for x in squares {
        *x = 1.0 / (*x / width as f32 + eps).sqrt();
    }
}

/// The sum of squares of a row.
#[inline(always)]
pub(crate) fn squares<V: Vector, T: Element>(x: &[T]) -> f32 {
    total::<V>(x.len(), &mut Squares { x })
}

struct Squares<'a, T> {
    x: &'a [T],
}

impl<T: Element> Term for Squares<'_, T> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        let x = V::load(&self.x[at..]);
        x.mul_add(x, sum)
    }
}

/// `sum = round(x + residual)`; returns the sum of its squares.
#[inline(always)]
pub(crate) fn add_squares<V: Vector, T: Element>(x: &[T], residual: &[T], sum: &mut [T]) -> f32 {
    total::<V>(x.len(), &mut AddSquares { x, residual, sum })
}

struct AddSquares<'a, T> {
    x: &'a [T],
    residual: &'a [T],
    sum: &'a mut [T],
}

impl<T: Element> Term for AddSquares<'_, T> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, squares: V) -> V {
        let sum = V::load(&self.x[at..]).add(V::load(&self.residual[at..])).rounded::<T>();
        sum.store(&mut self.sum[at..]);
        sum.mul_add(sum, squares)
    }
}

/// `x`, rounded to `T` where a norm `ROUNDS` before it multiplies by its weight.
#[inline(always)]
pub(crate) fn rounded<V: Vector, T: Element, const ROUNDS: bool>(x: V) -> V {
    if ROUNDS { x.rounded::<T>() } else { x }
}

/// `round(x * rstd) * weight` of elements `at..`.
#[inline(always)]
pub(crate) fn normed<V: Vector, T: Element, W: Element, const ROUNDS: bool>(
    x: &[T],
    weight: &[W],
    rstd: f32,
    at: usize,
) -> V {
    rounded::<V, T, ROUNDS>(V::load(&x[at..]).mul(V::splat(rstd))).mul(V::load(&weight[at..]))
}

/// `y = round(x * rstd) * weight`.
pub(crate) struct Normed<'a, T, W, const ROUNDS: bool> {
    pub(crate) x: &'a [T],
    pub(crate) weight: &'a [W],
    pub(crate) rstd: f32,
    pub(crate) y: &'a mut [T],
}

impl<T: Element, W: Element, const ROUNDS: bool> Step for Normed<'_, T, W, ROUNDS> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        normed::<V, T, W, ROUNDS>(self.x, self.weight, self.rstd, at).store(&mut self.y[at..]);
    }
}

/// The sum of `g x` with `g = dy * weight`.
#[inline(always)]
pub(crate) fn dot<V: Vector, T: Element, W: Element>(dy: &[T], x: &[T], weight: &[W]) -> f32 {
    total::<V>(x.len(), &mut Dot { dy, x, weight })
}

/// `mean(g n) * rstd * rstd`, the factor of `x` in the gradient, from the sum of `g x`.
#[inline(always)]
pub(crate) fn factor(dot: f32, width: usize, rstd: f32) -> f32 {
    dot / width as f32 * rstd * rstd * rstd
}

struct Dot<'a, T, W> {
    dy: &'a [T],
    x: &'a [T],
    weight: &'a [W],
}

impl<T: Element, W: Element> Term for Dot<'_, T, W> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        let g = V::load(&self.dy[at..]).mul(V::load(&self.weight[at..]));
        g.mul_add(V::load(&self.x[at..]), sum)
    }
}

/// `dx = rstd * (g - n * mean(g * n)) + dsum` with `n = x * rstd` and `g = dy * weight`.
pub(crate) struct Gradient<'a, T, W> {
    pub(crate) dy: &'a [T],
    pub(crate) x: &'a [T],
    pub(crate) weight: &'a [W],
    pub(crate) rstd: f32,
    pub(crate) factor: f32,
    pub(crate) dsum: Option<&'a [T]>,
    pub(crate) dx: &'a mut [T],
}

/// `g * rstd - x * factor`.
#[inline(always)]
pub(crate) fn slope<V: Vector>(g: V, x: V, rstd: f32, factor: f32) -> V {
    g.mul(V::splat(rstd)).sub(x.mul(V::splat(factor)))
}

impl<T: Element, W: Element> Step for Gradient<'_, T, W> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let g = V::load(&self.dy[at..]).mul(V::load(&self.weight[at..]));
        let dx = slope(g, V::load(&self.x[at..]), self.rstd, self.factor);
        let dx = if let Some(dsum) = self.dsum { dx.add(V::load(&dsum[at..])) } else { dx };
        dx.store(&mut self.dx[at..]);
    }
}

/// `sums += dn * round(x * rstd)`: what one row adds to the weight's gradient.
pub(crate) struct WeightGradient<'a, T, const ROUNDS: bool> {
    pub(crate) dy: &'a [T],
    pub(crate) x: &'a [T],
    pub(crate) rstd: f32,
    pub(crate) sums: &'a mut [f32],
}

impl<T: Element, const ROUNDS: bool> Step for WeightGradient<'_, T, ROUNDS> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        // The factor that the weight saw, as in the forward.
        let n = rounded::<V, T, ROUNDS>(V::load(&self.x[at..]).mul(V::splat(self.rstd)));
        V::load(&self.dy[at..]).mul_add(n, V::load(&self.sums[at..])).store(&mut self.sums[at..]);
    }
}
