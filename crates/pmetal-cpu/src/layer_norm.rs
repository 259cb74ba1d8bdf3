//! LayerNorm (Ba, Kiros and Hinton, 2016) of groups of columns, and its gradients.
//!
//! `y = (x - mean) * rstd * weight + bias` with `rstd = 1 / sqrt(variance + eps)` of each group, in f32, rounded once. A row has one group
//! or several; these share the weight and the bias, or have each its own part of them.

use rayon::prelude::*;

use crate::Element;
use crate::simd::{column_sums, rows_per_task};
use crate::vector::{Body, Step, Term, Vector, run, sweep, total};

/// What the backward needs of every group: mean and `1 / sqrt(variance + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNormStatistics<'a> {
    /// Means.
    pub mean: &'a [f32],
    /// Reciprocals of the standard deviations.
    pub rstd: &'a [f32],
}

/// Normalises every group: `x`, `y` are `[groups, width]`, `weight` and `bias` a multiple of `width` long: group `i` has their part `i`, and
/// when they end they begin again. `mean` and `rstd` (`[groups]`) are kept for the backward.
#[allow(clippy::too_many_arguments)]
pub fn layer_norm_forward<T: Element, W: Element>(
    x: &[T],
    weight: &[W],
    bias: Option<&[W]>,
    eps: f32,
    width: usize,
    y: &mut [T],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    check("layer_norm_forward", x.len(), width, weight.len(), [mean.len(), rstd.len()]);
    assert_eq!(x.len(), y.len(), "layer_norm_forward: y");
    assert!(bias.is_none_or(|bias| bias.len() == weight.len()), "layer_norm_forward: bias");
    let parts = weight.len() / width;
    // a task begins with the first part of the weight
    let groups = rows_per_task(width).next_multiple_of(parts);
    let forward = |((x, y), (mean, rstd))| run(Forward { x, weight, bias, eps, width, y, mean, rstd });
    let tensors = x.par_chunks(groups * width).zip(y.par_chunks_mut(groups * width));
    tensors.zip(mean.par_chunks_mut(groups).zip(rstd.par_chunks_mut(groups))).for_each(forward);
}

struct Forward<'a, T, W> {
    x: &'a [T],
    weight: &'a [W],
    bias: Option<&'a [W]>,
    eps: f32,
    width: usize,
    y: &'a mut [T],
    mean: &'a mut [f32],
    rstd: &'a mut [f32],
}

impl<T: Element, W: Element> Body for Forward<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, bias, eps, width, .. } = self;
        let results = self.y.chunks_exact_mut(width).zip(self.mean).zip(self.rstd);
        for ((x, ((y, kept_mean), kept_rstd)), first) in
            self.x.chunks_exact(width).zip(results).zip(parts(weight.len(), width))
        {
            let mean = total::<V>(width, &mut Sum { x }) / width as f32;
            let squares = total::<V>(width, &mut Squares { x, mean });
            let rstd = 1.0 / (squares / width as f32 + eps).sqrt();
            (*kept_mean, *kept_rstd) = (mean, rstd);
            let (weight, bias) = (&weight[first..first + width], bias.map(|bias| &bias[first..first + width]));
            sweep::<V>(width, &mut Normed { x, mean, rstd, weight, bias, y });
        }
    }
}

/// Where the parts of `len` elements begin, over and over.
fn parts(len: usize, width: usize) -> impl Iterator<Item = usize> {
    (0..len).step_by(width).cycle()
}

struct Sum<'a, T> {
    x: &'a [T],
}

impl<T: Element> Term for Sum<'_, T> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        sum.add(V::load(&self.x[at..]))
    }
}

/// Squares of what lies beside the mean.
struct Squares<'a, T> {
    x: &'a [T],
    mean: f32,
}

impl<T: Element> Term for Squares<'_, T> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        let x = V::load(&self.x[at..]).sub(V::splat(self.mean));
        x.mul_add(x, sum)
    }
}

struct Normed<'a, T, W> {
    x: &'a [T],
    mean: f32,
    rstd: f32,
    weight: &'a [W],
    bias: Option<&'a [W]>,
    y: &'a mut [T],
}

/// `(x - mean) * rstd` of elements `at..`.
#[inline(always)]
fn normed<V: Vector, T: Element>(x: &[T], mean: f32, rstd: f32, at: usize) -> V {
    V::load(&x[at..]).sub(V::splat(mean)).mul(V::splat(rstd))
}

impl<T: Element, W: Element> Step for Normed<'_, T, W> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let y = normed::<V, T>(self.x, self.mean, self.rstd, at).mul(V::load(&self.weight[at..]));
        let y = if let Some(bias) = self.bias { y.add(V::load(&bias[at..])) } else { y };
        y.store(&mut self.y[at..]);
    }
}

/// The gradient of [`layer_norm_forward`] in `x`: with `n = (x - mean) * rstd` and `g = dy * weight`,
/// `dx = rstd * (g - mean(g) - n * mean(g * n))`.
pub fn layer_norm_backward<T: Element, W: Element>(
    dy: &[T],
    x: &[T],
    weight: &[W],
    statistics: LayerNormStatistics,
    width: usize,
    dx: &mut [T],
) {
    let LayerNormStatistics { mean, rstd } = statistics;
    check("layer_norm_backward", x.len(), width, weight.len(), [mean.len(), rstd.len()]);
    assert_eq!(x.len(), dy.len(), "layer_norm_backward: dy");
    assert_eq!(x.len(), dx.len(), "layer_norm_backward: dx");
    let groups = rows_per_task(width).next_multiple_of(weight.len() / width);
    let backward = |(((dy, x), dx), (mean, rstd))| run(Backward { dy, x, weight, mean, rstd, width, dx });
    let tensors =
        dy.par_chunks(groups * width).zip(x.par_chunks(groups * width)).zip(dx.par_chunks_mut(groups * width));
    tensors.zip(mean.par_chunks(groups).zip(rstd.par_chunks(groups))).for_each(backward);
}

struct Backward<'a, T, W> {
    dy: &'a [T],
    x: &'a [T],
    weight: &'a [W],
    mean: &'a [f32],
    rstd: &'a [f32],
    width: usize,
    dx: &'a mut [T],
}

impl<T: Element, W: Element> Body for Backward<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, width, .. } = self;
        let tensors = self.dy.chunks_exact(width).zip(self.x.chunks_exact(width)).zip(self.dx.chunks_exact_mut(width));
        let statistics = self.mean.iter().zip(self.rstd);
        for ((((dy, x), dx), (&mean, &rstd)), first) in tensors.zip(statistics).zip(parts(weight.len(), width)) {
            let group = Group { dy, x, weight: &weight[first..first + width], mean, rstd };
            let g = total::<V>(width, &mut Slopes { group }) / width as f32;
            let gn = total::<V>(width, &mut SlopesAlong { group }) / width as f32;
            sweep::<V>(width, &mut Gradient { group, g, gn, dx });
        }
    }
}

/// A group, the gradient of its norm, and its statistics.
struct Group<'a, T, W> {
    dy: &'a [T],
    x: &'a [T],
    weight: &'a [W],
    mean: f32,
    rstd: f32,
}

impl<T, W> Clone for Group<'_, T, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, W> Copy for Group<'_, T, W> {}

impl<T: Element, W: Element> Group<'_, T, W> {
    #[inline(always)]
    fn g<V: Vector>(&self, at: usize) -> V {
        V::load(&self.dy[at..]).mul(V::load(&self.weight[at..]))
    }

    #[inline(always)]
    fn n<V: Vector>(&self, at: usize) -> V {
        normed::<V, T>(self.x, self.mean, self.rstd, at)
    }
}

/// The terms of the sum of `g`.
struct Slopes<'a, T, W> {
    group: Group<'a, T, W>,
}

impl<T: Element, W: Element> Term for Slopes<'_, T, W> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        sum.add(self.group.g::<V>(at))
    }
}

/// The terms of the sum of `g n`.
struct SlopesAlong<'a, T, W> {
    group: Group<'a, T, W>,
}

impl<T: Element, W: Element> Term for SlopesAlong<'_, T, W> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        self.group.g::<V>(at).mul_add(self.group.n(at), sum)
    }
}

struct Gradient<'a, T, W> {
    group: Group<'a, T, W>,
    /// `mean(g)`, `mean(g n)`.
    g: f32,
    gn: f32,
    dx: &'a mut [T],
}

impl<T: Element, W: Element> Step for Gradient<'_, T, W> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let along = self.group.n::<V>(at).mul(V::splat(self.gn));
        let slope = self.group.g::<V>(at).sub(V::splat(self.g)).sub(along);
        slope.mul(V::splat(self.group.rstd)).store(&mut self.dx[at..]);
    }
}

/// What the weight's gradient grows by: the sum of `dy * n` over all groups that share a part of it. `dweight` is as long as the weight. (That
/// of the bias is the sum of `dy`: [`bias_grad`](crate::bias_grad).)
pub fn layer_norm_weight_gradient<T: Element>(
    dy: &[T],
    x: &[T],
    statistics: LayerNormStatistics,
    width: usize,
    dweight: &mut [f32],
) {
    let LayerNormStatistics { mean, rstd } = statistics;
    check("layer_norm_weight_gradient", x.len(), width, dweight.len(), [mean.len(), rstd.len()]);
    assert_eq!(x.len(), dy.len(), "layer_norm_weight_gradient: dy");
    let (row, groups) = (dweight.len(), dweight.len() / width);
    assert!(x.len().is_multiple_of(row), "layer_norm_weight_gradient: {} elements in rows of {row}", x.len());
    column_sums(x.len() / row, dweight, |first, rows, sums| {
        let (range, of) = (first * row..(first + rows) * row, first * groups..(first + rows) * groups);
        run(WeightRows { dy: &dy[range.clone()], x: &x[range], mean: &mean[of.clone()], rstd: &rstd[of], width, sums });
    });
}

struct WeightRows<'a, T> {
    dy: &'a [T],
    x: &'a [T],
    mean: &'a [f32],
    rstd: &'a [f32],
    width: usize,
    sums: &'a mut [f32],
}

impl<T: Element> Body for WeightRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { width, sums, .. } = self;
        let groups = self.dy.chunks_exact(width).zip(self.x.chunks_exact(width)).zip(self.mean.iter().zip(self.rstd));
        for (((dy, x), (&mean, &rstd)), first) in groups.zip(parts(sums.len(), width)) {
            sweep::<V>(width, &mut WeightGradient { dy, x, mean, rstd, sums: &mut sums[first..first + width] });
        }
    }
}

struct WeightGradient<'a, T> {
    dy: &'a [T],
    x: &'a [T],
    mean: f32,
    rstd: f32,
    sums: &'a mut [f32],
}

impl<T: Element> Step for WeightGradient<'_, T> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let n = normed::<V, T>(self.x, self.mean, self.rstd, at);
        V::load(&self.dy[at..]).mul_add(n, V::load(&self.sums[at..])).store(&mut self.sums[at..]);
    }
}

fn check(name: &str, len: usize, width: usize, weight: usize, statistics: [usize; 2]) {
    assert!(width > 0 && len.is_multiple_of(width), "{name}: {len} elements in groups of {width}");
    assert!(weight > 0 && weight.is_multiple_of(width), "{name}: a weight of {weight} for groups of {width}");
    assert_eq!(statistics, [len / width; 2], "{name}: statistics");
}
