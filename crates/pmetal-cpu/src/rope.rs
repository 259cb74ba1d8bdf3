//! Rotary position embedding (Su et al., 2021) on half-split pairs, alone and behind the norm of each head.

use rayon::prelude::*;

use crate::Element;
use crate::simd::rows_per_task;
use crate::vector::{Body, Step, Vector, run, sweep};

/// Turns the pairs `(i, i + head_dim / 2)` of every head by the angle of its token and frequency, in place.
///
/// `x` is `[tokens, heads, head_dim]`; `cos` and `sin` are `[tokens, head_dim / 2]`, any attention factor already in
/// them. `inverse` turns back by the same angle, which is the backward. The rotation is f32, rounded once.
pub fn rope<T: Element>(x: &mut [T], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) {
    check("rope", x.len(), heads, head_dim, cos, sin);
    let (width, half) = (heads * head_dim, head_dim / 2);
    let rows = rows_per_task(width);
    let turn = |((x, cos), sin)| run(Turn { x, heads, cos, sin, half, inverse });
    if x.len() <= rows * width {
        return turn(((x, cos), sin));
    }
    x.par_chunks_mut(rows * width).zip(cos.par_chunks(rows * half)).zip(sin.par_chunks(rows * half)).for_each(turn);
}

/// [`rope`] of `x` into `y`.
pub fn rope_into<T: Element>(
    x: &[T],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    inverse: bool,
    y: &mut [T],
) {
    check("rope_into", x.len(), heads, head_dim, cos, sin);
    assert_eq!(x.len(), y.len(), "rope_into: y");
    let (width, half) = (heads * head_dim, head_dim / 2);
    let rows = rows_per_task(width);
    let turn = |((y, x), (cos, sin)): ((&mut [T], &[T]), _)| {
        // a task's rows stay in the first caches between copy and turn
        y.copy_from_slice(x);
        run(Turn { x: y, heads, cos, sin, half, inverse });
    };
    if x.len() <= rows * width {
        return turn(((y, x), (cos, sin)));
    }
    let angles = cos.par_chunks(rows * half).zip(sin.par_chunks(rows * half));
    y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).zip(angles).for_each(turn);
}

/// Asserts that operands fit together.
pub(crate) fn check(name: &str, len: usize, heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "{name}: head_dim {head_dim} is not even");
    let (width, half) = (heads * head_dim, head_dim / 2);
    assert!(width > 0 && len.is_multiple_of(width), "{name}: x has {len} elements, width {width}");
    assert_eq!(cos.len(), len / width * half, "{name}: cos");
    assert_eq!(sin.len(), len / width * half, "{name}: sin");
}

struct Turn<'a, T> {
    x: &'a mut [T],
    heads: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
    inverse: bool,
}

impl<T: Element> Body for Turn<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { x, heads, cos, sin, half, inverse } = self;
        let tokens = x.chunks_exact_mut(heads * 2 * half).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half));
        for ((token, cos), sin) in tokens {
            let angles = Angles::new(cos, sin, inverse);
            for head in token.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                sweep::<V>(half, &mut TurnHead { angles, low, high });
            }
        }
    }
}

struct TurnHead<'a, T> {
    angles: Angles<'a>,
    low: &'a mut [T],
    high: &'a mut [T],
}

impl<T: Element> Step for TurnHead<'_, T> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let (a, b) = self.angles.turned(at, V::load(&self.low[at..]), V::load(&self.high[at..]));
        a.store(&mut self.low[at..]);
        b.store(&mut self.high[at..]);
    }
}

/// The angles of a token.
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    sign: f32,
}

impl<'a> Angles<'a> {
    /// Angles to turn by, or back where `inverse`.
    #[inline(always)]
    pub(crate) fn new(cos: &'a [f32], sin: &'a [f32], inverse: bool) -> Self {
        Self { cos, sin, sign: if inverse { -1.0 } else { 1.0 } }
    }

    /// The pairs `at..at + V::LANES`, turned.
    #[inline(always)]
    pub(crate) fn turned<V: Vector>(&self, at: usize, a: V, b: V) -> (V, V) {
        let (cos, sin) = (V::load(&self.cos[at..]), V::load(&self.sin[at..]).mul(V::splat(self.sign)));
        (a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin)))
    }
}
