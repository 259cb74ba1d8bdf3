//! The gated activations of MLPs: `y = act(gate) * up`.

use rayon::prelude::*;

use crate::Element;
use crate::simd::CHUNK;
use crate::vector::{Body, Step, Vector, run, sweep};

/// `y = silu(gate) * up` with `silu(z) = z * sigmoid(z)` (Shazeer, "GLU variants improve transformer", 2020), elementwise.
pub fn swiglu_forward<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    forward(Silu, gate, up, y);
}

/// The gradients of [`swiglu_forward`], with `s = sigmoid(gate)`:
/// `dgate = dy * up * s * (1 + gate * (1 - s))` and `dup = dy * gate * s`.
pub fn swiglu_backward<T: Element>(dy: &[T], gate: &[T], up: &[T], dgate: &mut [T], dup: &mut [T]) {
    backward(Silu, dy, gate, up, dgate, dup);
}

/// `y = gelu(gate) * up` with `gelu(z) = z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))) / 2` (Hendrycks and Gimpel, "Gaussian error
/// linear units", 2016), elementwise.
pub fn geglu_forward<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    forward(GeluTanh, gate, up, y);
}

/// The gradients of [`geglu_forward`]: `dgate = dy * up * gelu'(gate)` and `dup = dy * gelu(gate)`.
pub fn geglu_backward<T: Element>(dy: &[T], gate: &[T], up: &[T], dgate: &mut [T], dup: &mut [T]) {
    backward(GeluTanh, dy, gate, up, dgate, dup);
}

/// `y = (min(max(up, -limit), limit) + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`, as in GPT-OSS, elementwise.
pub fn clamped_forward<T: Element>(alpha: f32, limit: f32, gate: &[T], up: &[T], y: &mut [T]) {
    forward(Clamped { alpha, limit }, gate, up, y);
}

/// The gradients of [`clamped_forward`], with `s = sigmoid(alpha * g)`: `dgate = dy * (u + 1) * s * (1 + alpha * g * (1 - s))` up to the limit
/// and `dup = dy * g * s` between the limits, 0 beyond.
#[allow(clippy::too_many_arguments, reason = "what the formula needs")]
pub fn clamped_backward<T: Element>(
    alpha: f32,
    limit: f32,
    dy: &[T],
    gate: &[T],
    up: &[T],
    dgate: &mut [T],
    dup: &mut [T],
) {
    backward(Clamped { alpha, limit }, dy, gate, up, dgate, dup);
}

fn forward<T: Element>(function: impl Function, gate: &[T], up: &[T], y: &mut [T]) {
    assert_eq!(gate.len(), up.len(), "gated activation: up");
    assert_eq!(gate.len(), y.len(), "gated activation: y");
    let forward = |((y, gate), up)| run(Forward { gated: Gated { function, gate, up }, y });
    if y.len() <= CHUNK {
        return forward(((y, gate), up));
    }
    y.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(forward);
}

fn backward<T: Element>(function: impl Function, dy: &[T], gate: &[T], up: &[T], dgate: &mut [T], dup: &mut [T]) {
    for (name, len) in [("gate", gate.len()), ("up", up.len()), ("dgate", dgate.len()), ("dup", dup.len())] {
        assert_eq!(dy.len(), len, "gated activation's gradient: {name}");
    }
    let backward =
        |(((dy, gate), up), (dgate, dup))| run(Backward { gated: Gated { function, gate, up }, dy, dgate, dup });
    if dy.len() <= CHUNK {
        return backward((((dy, gate), up), (dgate, dup)));
    }
    let inputs = dy.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    inputs.zip(dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK))).for_each(backward);
}

/// The function of a gate on vectors.
trait Function: Copy + Send + Sync {
    /// The function, and its slope.
    fn at<V: Vector>(self, z: V) -> (V, V);

    /// What the function is multiplied by.
    #[inline(always)]
    fn factor<V: Vector>(self, up: V) -> V {
        up
    }

    /// The gradient of `up` out of that of its factor.
    #[inline(always)]
    fn through_factor<V: Vector>(self, _up: V, d: V) -> V {
        d
    }
}

#[derive(Clone, Copy)]
struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn at<V: Vector>(self, z: V) -> (V, V) {
        let s = z.sigmoid();
        let y = z.mul(s);
        // s + z s (1 - s)
        (y, y.mul(V::splat(1.0).sub(s)).add(s))
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Function for GeluTanh {
    #[inline(always)]
    fn at<V: Vector>(self, z: V) -> (V, V) {
        // (1 + tanh(u)) / 2 is sigmoid(2 u), here with 2 u = z (a + b z^2).
        const A: f32 = 1.595_769;
        const B: f32 = A * 0.044_715;
        let square = z.mul(z);
        let s = z.mul(square.mul_add(V::splat(B), V::splat(A))).sigmoid();
        let y = z.mul(s);
        let inner = square.mul_add(V::splat(3.0 * B), V::splat(A));
        (y, y.mul(V::splat(1.0).sub(s)).mul_add(inner, s))
    }
}

/// 1 where `z` is at most `limit`, else 0.
#[inline(always)]
fn up_to<V: Vector>(limit: V, z: V) -> V {
    // floats that differ have a difference that is not zero, and by this factor none of it is below 1
    const STEEP: f32 = 1e38;
    let (zero, one) = (V::splat(0.0), V::splat(1.0));
    limit.sub(z).mul(V::splat(STEEP)).add(one).max(zero).min(one)
}

#[derive(Clone, Copy)]
struct Clamped {
    alpha: f32,
    limit: f32,
}

impl Function for Clamped {
    #[inline(always)]
    fn at<V: Vector>(self, z: V) -> (V, V) {
        let (alpha, limit) = (V::splat(self.alpha), V::splat(self.limit));
        let g = z.min(limit);
        let s = g.mul(alpha).sigmoid();
        let y = g.mul(s);
        (y, y.mul(alpha).mul(V::splat(1.0).sub(s)).add(s).mul(up_to(limit, z)))
    }

    #[inline(always)]
    fn factor<V: Vector>(self, up: V) -> V {
        up.max(V::splat(-self.limit)).min(V::splat(self.limit)).add(V::splat(1.0))
    }

    #[inline(always)]
    fn through_factor<V: Vector>(self, up: V, d: V) -> V {
        // the larger of a number and its negative is its magnitude
        d.mul(up_to(V::splat(self.limit), up.max(V::splat(0.0).sub(up))))
    }
}

#[derive(Clone, Copy)]
struct Gated<'a, T, F> {
    function: F,
    gate: &'a [T],
    up: &'a [T],
}

struct Forward<'a, T, F> {
    gated: Gated<'a, T, F>,
    y: &'a mut [T],
}

impl<T: Element, F: Function> Body for Forward<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        sweep::<V>(self.y.len(), &mut self);
    }
}

impl<T: Element, F: Function> Step for Forward<'_, T, F> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let Gated { function, gate, up } = self.gated;
        let (y, _) = function.at(V::load(&gate[at..]));
        y.mul(function.factor(V::load(&up[at..]))).store(&mut self.y[at..]);
    }
}

struct Backward<'a, T, F> {
    gated: Gated<'a, T, F>,
    dy: &'a [T],
    dgate: &'a mut [T],
    dup: &'a mut [T],
}

impl<T: Element, F: Function> Body for Backward<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        sweep::<V>(self.dy.len(), &mut self);
    }
}

impl<T: Element, F: Function> Step for Backward<'_, T, F> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let Gated { function, gate, up } = self.gated;
        let dy = V::load(&self.dy[at..]);
        let (y, slope) = function.at(V::load(&gate[at..]));
        let up = V::load(&up[at..]);
        dy.mul(function.factor(up)).mul(slope).store(&mut self.dgate[at..]);
        function.through_factor(up, dy.mul(y)).store(&mut self.dup[at..]);
    }
}
