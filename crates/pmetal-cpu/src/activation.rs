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
        y.mul(V::load(&up[at..])).store(&mut self.y[at..]);
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
        dy.mul(V::load(&up[at..])).mul(slope).store(&mut self.dgate[at..]);
        dy.mul(y).store(&mut self.dup[at..]);
    }
}
