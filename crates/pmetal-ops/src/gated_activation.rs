//! The gate of an MLP: `y = act(gate) * up`, with `silu(z) = z / (1 + exp(-z))` as in Llama, or Gemma's approximation
//! `gelu(z) = z (1 + tanh(sqrt(2/π) (z + 0.044715 z³))) / 2`; or GPT-OSS's clamped `y = (u + 1) g sigmoid(alpha g)` with `g = min(gate, limit)`
//! and `u = min(max(up, -limit), limit)`.
//!
//! Sources: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; the clamp as
//! transformers computes it. Operands `[tokens, intermediate]`.

use std::sync::Arc;

use candle_core::Tensor;
use pmetal_metal::{Gpu, Grid, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{in_octets, pitch_of, readable},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
    rows::{GradPlace, SpareRows, empty_rows},
};

const OP: &str = "gated_activation";

/// The function of a gate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `z / (1 + exp(-z))`.
    Silu,
    /// `z (1 + tanh(sqrt(2/π) (z + 0.044715 z³))) / 2`.
    GeluTanh,
    /// `z sigmoid(alpha z)` of a gate clamped above, times `up` clamped on both sides, plus one.
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// The clamp: a positive number. No gradient comes through beyond it.
        limit: f32,
    },
}

impl Activation {
    /// What the clamped kernels read.
    fn alpha_and_limit(self) -> (f32, f32) {
        match self {
            Self::Clamped { alpha, limit } => (alpha, limit),
            Self::Silu | Self::GeluTanh => (0.0, 0.0),
        }
    }
}

/// `act(gate) * up`, operands of one shape and dtype; on a GPU with `spare` free columns behind each row.
pub fn gated_activation(activation: Activation, gate: &Value, up: &Value, spare: usize) -> Result<Value> {
    let _span = profile::span(OP);
    gate.tensor().dims2()?;
    if gate.tensor().shape() != up.tensor().shape() || gate.tensor().dtype() != up.tensor().dtype() {
        return Err(Error::operand(OP, "up", gate.tensor().dims(), up.tensor().dims()));
    }
    let place = place(gate.tensor(), OP)?;
    if let Place::Gpu(gpu) = place {
        return on_gpu(gpu, activation, gate, up, spare);
    }
    if let Place::Reference = place {
        return Ok(one(composite(&[gate, up], move |t| Ok(vec![reference(activation, &t[0], &t[1])?]))?));
    }
    let (gate_t, up_t) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    let y = forward(activation, &gate_t, &up_t)?;
    profile::moved(&[&gate_t, &up_t, &y]);
    Ok(one(Value::record(vec![y], &[gate, up], move |grads| {
        let dy = only(grads, OP)?.contiguous()?;
        let (dgate, dup) = backward(activation, &dy, &gate_t, &up_t)?;
        profile::moved(&[&dy, &gate_t, &up_t, &dgate, &dup]);
        Ok(vec![Some(dgate), Some(dup)])
    })))
}

fn on_gpu(gpu: Arc<dyn Gpu>, activation: Activation, gate: &Value, up: &Value, spare: usize) -> Result<Value> {
    let (gate_t, up_t) = (readable(gate.tensor())?, readable(up.tensor())?);
    let y = forward_on_gpu(&*gpu, activation, &gate_t, &up_t, spare)?;
    profile::moved(&[&gate_t, &up_t, &y.rows]);
    let places = [gate.grad_place(), up.grad_place()];
    let value = one(Value::record(vec![y.rows.clone()], &[gate, up], move |grads| {
        let dy = only(grads, OP)?;
        let (dgate, dup) = backward_on_gpu(&*gpu, activation, &dy, &gate_t, &up_t, &places)?;
        profile::moved(&[&dy, &gate_t, &up_t, &dgate, &dup]);
        Ok(vec![Some(dgate), Some(dup)])
    }));
    Ok(y.attach(value))
}

fn forward(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (g, u) = (View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let mut y = room::<T>(gate.elem_count());
        let (g, u) = (g.slice::<T>()?, u.slice::<T>()?);
        match activation {
            Activation::Silu => pmetal_cpu::swiglu_forward(g, u, &mut y),
            Activation::GeluTanh => pmetal_cpu::geglu_forward(g, u, &mut y),
            Activation::Clamped { alpha, limit } => pmetal_cpu::clamped_forward(alpha, limit, g, u, &mut y),
        }
        tensor(y, gate.shape().clone())
    })
}

fn backward(activation: Activation, dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (d, g, u) = (View::of_tensor(dy, OP)?, View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let (mut dgate, mut dup) = (room::<T>(gate.elem_count()), room::<T>(gate.elem_count()));
        let (d, g, u) = (d.slice::<T>()?, g.slice::<T>()?, u.slice::<T>()?);
        match activation {
            Activation::Silu => pmetal_cpu::swiglu_backward(d, g, u, &mut dgate, &mut dup),
            Activation::GeluTanh => pmetal_cpu::geglu_backward(d, g, u, &mut dgate, &mut dup),
            Activation::Clamped { alpha, limit } => {
                pmetal_cpu::clamped_backward(alpha, limit, d, g, u, &mut dgate, &mut dup);
            }
        }
        Ok((tensor(dgate, gate.shape().clone())?, tensor(dup, gate.shape().clone())?))
    })
}

fn forward_on_gpu(
    gpu: &dyn Gpu,
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    spare: usize,
) -> Result<SpareRows> {
    let (rows, width) = gate.dims2()?;
    let (dtype, y) = (gate.dtype(), empty_rows(rows, width, spare, gate.dtype(), gate.device())?);
    let (grid, rows_each) = grid_of_rows(rows, width);
    let (alpha, limit) = activation.alpha_and_limit();
    let params = kernels::GateParams {
        rows: rows as u32,
        width: width as u32,
        rows_each,
        aligned: in_octets(&[gate, up, &y.rows]),
        gate_pitch: pitch_of(gate),
        up_pitch: pitch_of(up),
        y_pitch: pitch_of(&y.rows),
        alpha,
        limit,
    };
    match activation {
        Activation::Silu => kernels::swiglu(gpu, dtype, grid, gate, up, &y.rows, params)?,
        Activation::GeluTanh => kernels::geglu(gpu, dtype, grid, gate, up, &y.rows, params)?,
        Activation::Clamped { .. } => kernels::clamped_gate(gpu, dtype, grid, gate, up, &y.rows, params)?,
    }
    Ok(y)
}

fn backward_on_gpu(
    gpu: &dyn Gpu,
    activation: Activation,
    dy: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    places: &[GradPlace; 2],
) -> Result<(Tensor, Tensor)> {
    let (rows, width) = gate.dims2()?;
    let (dtype, dy) = (gate.dtype(), &readable(dy)?);
    let room = |place: &GradPlace| place.empty((rows, width), dtype, gate.device());
    let (dgate, dup) = (room(&places[0])?, room(&places[1])?);
    let (grid, rows_each) = grid_of_rows(rows, width);
    let (alpha, limit) = activation.alpha_and_limit();
    let params = kernels::GateBackwardParams {
        rows: rows as u32,
        width: width as u32,
        rows_each,
        aligned: in_octets(&[dy, gate, up, &dgate, &dup]),
        dy_pitch: pitch_of(dy),
        gate_pitch: pitch_of(gate),
        up_pitch: pitch_of(up),
        dgate_pitch: pitch_of(&dgate),
        dup_pitch: pitch_of(&dup),
        alpha,
        limit,
    };
    match activation {
        Activation::Silu => kernels::swiglu_backward(gpu, dtype, grid, dy, gate, up, &dgate, &dup, params)?,
        Activation::GeluTanh => kernels::geglu_backward(gpu, dtype, grid, dy, gate, up, &dgate, &dup, params)?,
        Activation::Clamped { .. } => {
            kernels::clamped_gate_backward(gpu, dtype, grid, dy, gate, up, &dgate, &dup, params)?;
        }
    }
    Ok((dgate, dup))
}

/// Threads that have eight columns each, and how many rows.
fn grid_of_rows(rows: usize, width: usize) -> (Grid, u32) {
    let rows_each = rows.div_ceil(MAX_GROUPS).max(1);
    let octets = width.div_ceil(8);
    let groups = octets.div_ceil(MAX_THREADS);
    let threads = octets.div_ceil(groups.max(1)).next_multiple_of(32).max(32);
    (Grid { groups: [octets.div_ceil(threads), rows.div_ceil(rows_each), 1], threads }, rows_each as u32)
}

/// Threads of a threadgroup at most.
const MAX_THREADS: usize = 256;

/// Threadgroups in y at most.
const MAX_GROUPS: usize = 65_535;

/// The formula in plain candle.
fn reference(activation: Activation, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
    let act = match activation {
        Activation::Silu => (gate / (gate.neg()?.exp()? + 1.0)?)?,
        Activation::GeluTanh => {
            let inner = ((gate + ((gate.sqr()? * gate)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
            ((gate * (inner.tanh()? + 1.0)?)? * 0.5)?
        }
        Activation::Clamped { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let gate = gate.minimum(limit)?;
            let sigmoid = ((&gate * -alpha)?.exp()? + 1.0)?.recip()?;
            return (gate * sigmoid)? * (up.maximum(-limit)?.minimum(limit)? + 1.0)?;
        }
    };
    act * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_columns, check_op, random};

    #[test]
    fn columns_of_wider_matrices() {
        for (shape, spare) in [([1, 1], 0), ([3, 19], 5), ([70, 24], 16)] {
            let inputs = [random(&shape, 1), random(&shape, 2)];
            for activation in [Activation::Silu, Activation::Clamped { alpha: 1.702, limit: 0.7 }] {
                check_columns(&inputs, &[0, 1], |v| Ok(vec![gated_activation(activation, &v[0], &v[1], spare)?]));
            }
        }
    }

    #[test]
    fn gated_activations_and_their_gradients() {
        // gates and factors on both sides of the limit, which is no number of sixteen bits
        let clamped = Activation::Clamped { alpha: 1.702, limit: 1.1003 };
        for (activation, (shape, spare)) in [Activation::Silu, Activation::GeluTanh, clamped]
            .iter()
            .flat_map(|&a| [([1, 1], 0), ([3, 19], 5), ([3, 24], 0), ([2, 520], 16), ([5, 2056], 8)].map(|s| (a, s)))
        {
            check_op(
                &[(random(&shape, 1) * 4.0).unwrap(), (random(&shape, 2) * 1.5).unwrap()],
                move |t| Ok(vec![reference(activation, &t[0], &t[1])?]),
                move |v| Ok(vec![gated_activation(activation, &v[0], &v[1], spare)?]),
            );
        }
    }
}
