//! The norm of each head and the rotary position embedding behind it, in one pass, and the gradient.
//!
//! The formulas are those of `norm.rs` and `rope.rs`; what lies between the two is f32 and never stored.

use rayon::prelude::*;

use crate::Element;
use crate::norm_row::{GROUP, factor, group, invert, normed, rounded, slope, squares};
use crate::rope::Angles;
use crate::simd::{column_sums, rows_per_task};
use crate::vector::{Body, Step, Term, Vector, run, sweep, total};

/// Cosines and sines of tokens, `[tokens, head_dim / 2]` each, and how many heads a token has.
#[derive(Clone, Copy, Debug)]
pub struct HeadAngles<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Heads of a token.
    pub heads: usize,
}

impl<'a> HeadAngles<'a> {
    #[inline(always)]
    fn of_head(&self, head: usize, half: usize, inverse: bool) -> Angles<'a> {
        let range = head / self.heads * half..(head / self.heads + 1) * half;
        Angles::new(&self.cos[range.clone()], &self.sin[range], inverse)
    }
}

/// `y = rope(rms_norm(x))` for every head: `x`, `y` are `[tokens, heads, head_dim]`, `weight` is `[head_dim]`; `rstd`
/// (`[tokens, heads]`) is kept for the backward.
pub fn rms_norm_rope_forward<T: Element, W: Element>(
    x: &[T],
    weight: &[W],
    eps: f32,
    rounds_first: bool,
    angles: HeadAngles,
    y: &mut [T],
    rstd: &mut [f32],
) {
    let (width, heads) = (weight.len(), angles.heads);
    check("rms_norm_rope_forward", x.len(), heads, width, angles.cos, angles.sin);
    assert_eq!(x.len(), y.len(), "rms_norm_rope_forward: y");
    assert_eq!(rstd.len(), x.len() / width, "rms_norm_rope_forward: rstd");
    match rounds_first {
        true => forward::<T, W, true>(x, weight, eps, angles, y, rstd),
        false => forward::<T, W, false>(x, weight, eps, angles, y, rstd),
    }
}

fn forward<T: Element, W: Element, const ROUNDS: bool>(
    x: &[T],
    weight: &[W],
    eps: f32,
    angles: HeadAngles,
    y: &mut [T],
    rstd: &mut [f32],
) {
    let (width, heads) = (weight.len(), angles.heads);
    let rows = rows_per_task(heads * width) * heads;
    let forward = |i: usize, x: &[T], y: &mut [T], rstd: &mut [f32]| {
        run(Forward::<T, W, ROUNDS> { x, weight, eps, angles, first: i * rows, y, rstd });
    };
    if rstd.len() <= rows {
        return forward(0, x, y, rstd);
    }
    let tensors = x.par_chunks(rows * width).zip(y.par_chunks_mut(rows * width));
    tensors.zip(rstd.par_chunks_mut(rows)).enumerate().for_each(|(i, ((x, y), rstd))| forward(i, x, y, rstd));
}

struct Forward<'a, T, W, const ROUNDS: bool> {
    x: &'a [T],
    weight: &'a [W],
    eps: f32,
    angles: HeadAngles<'a>,
    first: usize,
    y: &'a mut [T],
    rstd: &'a mut [f32],
}

impl<T: Element, W: Element, const ROUNDS: bool> Body for Forward<'_, T, W, ROUNDS> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, eps, angles, first, .. } = self;
        let (width, half) = (weight.len(), weight.len() / 2);
        let rows = group(width);
        let groups = self.x.chunks(rows * width).zip(self.y.chunks_mut(rows * width)).zip(self.rstd.chunks_mut(rows));
        for (i, ((x, y), rstd)) in groups.enumerate() {
            for (x, sum) in x.chunks_exact(width).zip(&mut *rstd) {
                *sum = squares::<V, T>(x);
            }
            invert(rstd, width, eps);
            let heads = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd);
            for (row, ((x, y), &mut rstd)) in heads.enumerate() {
                let angles = angles.of_head(first + i * rows + row, half, false);
                let (low, high) = y.split_at_mut(half);
                sweep::<V>(half, &mut NormedTurned::<T, W, ROUNDS> { x, weight, rstd, angles, low, high });
            }
        }
    }
}

struct NormedTurned<'a, T, W, const ROUNDS: bool> {
    x: &'a [T],
    weight: &'a [W],
    rstd: f32,
    angles: Angles<'a>,
    low: &'a mut [T],
    high: &'a mut [T],
}

impl<T: Element, W: Element, const ROUNDS: bool> Step for NormedTurned<'_, T, W, ROUNDS> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let half = self.low.len();
        let a = normed::<V, T, W, ROUNDS>(self.x, self.weight, self.rstd, at);
        let b = normed::<V, T, W, ROUNDS>(self.x, self.weight, self.rstd, half + at);
        let (a, b) = self.angles.turned(at, a, b);
        a.store(&mut self.low[at..]);
        b.store(&mut self.high[at..]);
    }
}

/// The gradient of [`rms_norm_rope_forward`]: that of the rotation, then that of the norm. `dweight` (`[head_dim]`) grows by its
/// gradient.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_rope_backward<T: Element, W: Element>(
    dy: &[T],
    x: &[T],
    weight: &[W],
    rstd: &[f32],
    rounds_first: bool,
    angles: HeadAngles,
    dx: &mut [T],
    dweight: Option<&mut [f32]>,
) {
    let (width, heads) = (weight.len(), angles.heads);
    check("rms_norm_rope_backward", x.len(), heads, width, angles.cos, angles.sin);
    assert_eq!(x.len(), dy.len(), "rms_norm_rope_backward: dy");
    assert_eq!(x.len(), dx.len(), "rms_norm_rope_backward: dx");
    assert_eq!(rstd.len(), x.len() / width, "rms_norm_rope_backward: rstd");
    if let Some(dweight) = dweight {
        assert_eq!(dweight.len(), width, "rms_norm_rope_backward: dweight");
        column_sums(rstd.len(), dweight, |first, heads, sums| {
            let (range, rstd) = (first * width..(first + heads) * width, &rstd[first..first + heads]);
            let (dy, x) = (&dy[range.clone()], &x[range]);
            match rounds_first {
                true => run(WeightHeads::<T, true> { dy, x, rstd, angles, first, sums }),
                false => run(WeightHeads::<T, false> { dy, x, rstd, angles, first, sums }),
            }
        });
    }
    let rows = rows_per_task(heads * width) * heads;
    let backward = |(i, dx): (usize, &mut [T])| {
        let (first, count) = (i * rows, dx.len() / width);
        let range = first * width..first * width + dx.len();
        let rstd = &rstd[first..first + count];
        run(Backward { dy: &dy[range.clone()], x: &x[range], weight, rstd, angles, first, dx });
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
    angles: HeadAngles<'a>,
    first: usize,
    dx: &'a mut [T],
}

impl<T: Element, W: Element> Body for Backward<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { weight, angles, first, .. } = self;
        let (width, half) = (weight.len(), weight.len() / 2);
        let rows = group(width);
        let mut factors = [0.0; GROUP];
        let inputs = self.dy.chunks(rows * width).zip(self.x.chunks(rows * width)).zip(self.rstd.chunks(rows));
        for (i, (((dy, x), rstd), dx)) in inputs.zip(self.dx.chunks_mut(rows * width)).enumerate() {
            let heads = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(rstd).zip(first + i * rows..);
            for ((((dy, x), &rstd), head), kept) in heads.clone().zip(&mut factors) {
                let pairs = Pairs { dy, x, angles: angles.of_head(head, half, true), half };
                *kept = factor(total::<V>(half, &mut Dot { pairs, weight }), width, rstd);
            }
            let results = dx.chunks_exact_mut(width).zip(factors);
            for ((((dy, x), &rstd), head), (dx, factor)) in heads.zip(results) {
                let pairs = Pairs { dy, x, angles: angles.of_head(head, half, true), half };
                let (low, high) = dx.split_at_mut(half);
                sweep::<V>(half, &mut Gradient { pairs, weight, rstd, factor, low, high });
            }
        }
    }
}

/// A head's gradient, turned back, beside what was normalised.
#[derive(Clone, Copy)]
struct Pairs<'a, T> {
    dy: &'a [T],
    x: &'a [T],
    angles: Angles<'a>,
    half: usize,
}

impl<T: Element> Pairs<'_, T> {
    /// The norm's gradient at `at` and `half + at`.
    #[inline(always)]
    fn turned_back<V: Vector>(&self, at: usize) -> [V; 2] {
        let (a, b) = (V::load(&self.dy[at..]), V::load(&self.dy[self.half + at..]));
        self.angles.turned(at, a, b).into()
    }

    #[inline(always)]
    fn x<V: Vector>(&self, at: usize) -> [V; 2] {
        [V::load(&self.x[at..]), V::load(&self.x[self.half + at..])]
    }
}

#[inline(always)]
fn both<V: Vector, W: Element>(row: &[W], at: usize) -> [V; 2] {
    [V::load(&row[at..]), V::load(&row[row.len() / 2 + at..])]
}

struct Dot<'a, T, W> {
    pairs: Pairs<'a, T>,
    weight: &'a [W],
}

impl<T: Element, W: Element> Term for Dot<'_, T, W> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        let g = self.pairs.turned_back::<V>(at).mul(both(self.weight, at));
        let x = self.pairs.x::<V>(at);
        g[1].mul_add(x[1], g[0].mul_add(x[0], sum))
    }
}

struct Gradient<'a, T, W> {
    pairs: Pairs<'a, T>,
    weight: &'a [W],
    rstd: f32,
    factor: f32,
    low: &'a mut [T],
    high: &'a mut [T],
}

impl<T: Element, W: Element> Step for Gradient<'_, T, W> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let g = self.pairs.turned_back::<V>(at).mul(both(self.weight, at));
        let [low, high] = slope(g, self.pairs.x::<V>(at), self.rstd, self.factor);
        low.store(&mut self.low[at..]);
        high.store(&mut self.high[at..]);
    }
}

struct WeightHeads<'a, T, const ROUNDS: bool> {
    dy: &'a [T],
    x: &'a [T],
    rstd: &'a [f32],
    angles: HeadAngles<'a>,
    first: usize,
    sums: &'a mut [f32],
}

impl<T: Element, const ROUNDS: bool> Body for WeightHeads<'_, T, ROUNDS> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let (width, half) = (self.sums.len(), self.sums.len() / 2);
        let (low, high) = self.sums.split_at_mut(half);
        let heads = self.dy.chunks_exact(width).zip(self.x.chunks_exact(width)).zip(self.rstd);
        for (head, ((dy, x), &rstd)) in heads.enumerate() {
            let pairs = Pairs { dy, x, angles: self.angles.of_head(self.first + head, half, true), half };
            sweep::<V>(half, &mut WeightGradient::<T, ROUNDS> { pairs, rstd, low: &mut *low, high: &mut *high });
        }
    }
}

struct WeightGradient<'a, T, const ROUNDS: bool> {
    pairs: Pairs<'a, T>,
    rstd: f32,
    low: &'a mut [f32],
    high: &'a mut [f32],
}

impl<T: Element, const ROUNDS: bool> Step for WeightGradient<'_, T, ROUNDS> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let n = rounded::<[V; 2], T, ROUNDS>(self.pairs.x::<V>(at).mul(<[V; 2]>::splat(self.rstd)));
        let sums = [V::load(&self.low[at..]), V::load(&self.high[at..])];
        let [low, high] = self.pairs.turned_back::<V>(at).mul_add(n, sums);
        low.store(&mut self.low[at..]);
        high.store(&mut self.high[at..]);
    }
}

/// Asserts that operands fit together.
fn check(name: &str, len: usize, heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "{name}: head_dim {head_dim} is not even");
    let (width, half) = (heads * head_dim, head_dim / 2);
    assert!(width > 0 && len.is_multiple_of(width), "{name}: x has {len} elements, width {width}");
    assert_eq!(cos.len(), len / width * half, "{name}: cos");
    assert_eq!(sin.len(), len / width * half, "{name}: sin");
}
