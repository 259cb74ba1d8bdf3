//! Rotary position embedding (Su et al., 2021).

use rayon::prelude::*;

use crate::Element;
use crate::simd::rows_per_task;
use crate::vector::{Body, Step, Vector, run, sweep};

/// Which part of each head turns: as many pairs of columns as there are frequencies, from `start` on. The other columns pass through.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    /// Columns of a head.
    pub head_dim: usize,
    /// The first column that turns.
    pub start: usize,
    /// Whether pairs are neighbours, and not a column of the first half of those that turn with one of the second.
    pub interleaved: bool,
}

impl HeadLayout {
    /// All of a head turns, its first half with its second.
    pub const fn whole(head_dim: usize) -> Self {
        Self { head_dim, start: 0, interleaved: false }
    }
}

/// Turns the pairs of every head by the angles of their token and frequency, in place.
///
/// `x` is `[tokens, heads, head_dim]`; `cos` and `sin` are `[tokens, pairs]`, any attention factor already in them. `inverse` turns back by
/// the same angle, which is the backward. The rotation is f32, rounded once.
pub fn rope<T: Element>(x: &mut [T], heads: usize, layout: HeadLayout, cos: &[f32], sin: &[f32], inverse: bool) {
    let Some(half) = pairs("rope", x.len(), heads, layout, cos, sin) else { return };
    let width = heads * layout.head_dim;
    let rows = rows_per_task(width);
    let turn = |((x, cos), sin)| run(Turn { x, heads, layout, cos, sin, half, inverse });
    if x.len() <= rows * width {
        return turn(((x, cos), sin));
    }
    x.par_chunks_mut(rows * width).zip(cos.par_chunks(rows * half)).zip(sin.par_chunks(rows * half)).for_each(turn);
}

/// [`rope`] of `x` into `y`.
pub fn rope_into<T: Element>(
    x: &[T],
    heads: usize,
    layout: HeadLayout,
    cos: &[f32],
    sin: &[f32],
    inverse: bool,
    y: &mut [T],
) {
    assert_eq!(x.len(), y.len(), "rope_into: y");
    let Some(half) = pairs("rope_into", x.len(), heads, layout, cos, sin) else { return };
    let width = heads * layout.head_dim;
    let rows = rows_per_task(width);
    let turn = |((y, x), (cos, sin)): ((&mut [T], &[T]), _)| {
        // a task's rows stay in the first caches between copy and turn
        y.copy_from_slice(x);
        run(Turn { x: y, heads, layout, cos, sin, half, inverse });
    };
    if x.len() <= rows * width {
        return turn(((y, x), (cos, sin)));
    }
    let angles = cos.par_chunks(rows * half).zip(sin.par_chunks(rows * half));
    y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).zip(angles).for_each(turn);
}

/// The pairs of a head, none where there is no token; asserts that operands fit together.
fn pairs(name: &str, len: usize, heads: usize, layout: HeadLayout, cos: &[f32], sin: &[f32]) -> Option<usize> {
    let width = heads * layout.head_dim;
    assert!(width > 0 && len.is_multiple_of(width), "{name}: x has {len} elements, width {width}");
    assert_eq!(cos.len(), sin.len(), "{name}: sin");
    let tokens = len / width;
    let half = cos.len().checked_div(tokens)?;
    assert!(half > 0 && cos.len() == tokens * half, "{name}: {} cosines of {tokens} tokens", cos.len());
    assert!(layout.start + 2 * half <= layout.head_dim, "{name}: {half} pairs in {layout:?}");
    Some(half)
}

struct Turn<'a, T> {
    x: &'a mut [T],
    heads: usize,
    layout: HeadLayout,
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
    inverse: bool,
}

impl<T: Element> Body for Turn<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { x, heads, layout: HeadLayout { head_dim, start, interleaved }, cos, sin, half, inverse } = self;
        let tokens = x.chunks_exact_mut(heads * head_dim).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half));
        for ((token, cos), sin) in tokens {
            let angles = Angles::new(cos, sin, inverse);
            for head in token.chunks_exact_mut(head_dim) {
                let turning = &mut head[start..start + 2 * half];
                if interleaved {
                    turn_neighbours(turning, angles);
                } else {
                    let (low, high) = turning.split_at_mut(half);
                    sweep::<V>(half, &mut TurnHead { angles, low, high });
                }
            }
        }
    }
}

#[inline(always)]
fn turn_neighbours<T: Element>(turning: &mut [T], angles: Angles) {
    for (pair, [low, high]) in turning.as_chunks_mut().0.iter_mut().enumerate() {
        let (a, b) = angles.turned::<f32>(pair, low.to_f32(), high.to_f32());
        (*low, *high) = (T::from_f32(a), T::from_f32(b));
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
