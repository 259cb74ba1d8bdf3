//! The gated activation of Llama-like MLPs.

use rayon::prelude::*;

use crate::Element;
use crate::math::sigmoid;
use crate::simd::{CHUNK, simd_fn};

/// `y = silu(gate) * up` with `silu(z) = z * sigmoid(z)` (Shazeer, "GLU variants improve transformer", 2020), elementwise.
pub fn swiglu_forward<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    assert_eq!(gate.len(), up.len(), "swiglu_forward: up");
    assert_eq!(gate.len(), y.len(), "swiglu_forward: y");
    if y.len() <= CHUNK {
        return forward(gate, up, y);
    }
    y.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK))
        .zip(up.par_chunks(CHUNK))
        .for_each(|((y, gate), up)| forward(gate, up, y));
}

simd_fn! {
    fn forward['a; T](gate: &'a [T], up: &'a [T], y: &'a mut [T]) -> () {
        for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
            let g = g.to_f32();
            *y = T::from_f32(g * sigmoid(g) * u.to_f32());
        }
    }
}

/// The gradients of [`swiglu_forward`], with `s = sigmoid(gate)`:
/// `dgate = dy * up * s * (1 + gate * (1 - s))` and `dup = dy * gate * s`.
pub fn swiglu_backward<T: Element>(dy: &[T], gate: &[T], up: &[T], dgate: &mut [T], dup: &mut [T]) {
    for (name, len) in [("gate", gate.len()), ("up", up.len()), ("dgate", dgate.len()), ("dup", dup.len())] {
        assert_eq!(dy.len(), len, "swiglu_backward: {name}");
    }
    if dy.len() <= CHUNK {
        return backward(dy, gate, up, dgate, dup);
    }
    let inputs = dy.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    let outputs = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
    inputs.zip(outputs).for_each(|(((dy, gate), up), (dgate, dup))| backward(dy, gate, up, dgate, dup));
}

simd_fn! {
    fn backward['a; T](dy: &'a [T], gate: &'a [T], up: &'a [T], dgate: &'a mut [T], dup: &'a mut [T]) -> () {
        let inputs = dy.iter().zip(gate).zip(up);
        for (((&dy, &g), &u), (dgate, dup)) in inputs.zip(dgate.iter_mut().zip(dup)) {
            let (dy, g, u) = (dy.to_f32(), g.to_f32(), u.to_f32());
            let s = sigmoid(g);
            *dgate = T::from_f32(dy * u * s * (1.0 + g * (1.0 - s)));
            *dup = T::from_f32(dy * g * s);
        }
    }
}
