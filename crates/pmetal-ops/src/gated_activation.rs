//! The gate of an MLP: `y = act(gate) * up`, with `silu(z) = z / (1 + exp(-z))` as in Llama, or Gemma's approximation
//! `gelu(z) = z (1 + tanh(sqrt(2/π) (z + 0.044715 z³))) / 2`.
//!
//! Sources: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. Operands
//! `[tokens, intermediate]`.

use candle_core::Tensor;
use pmetal_metal::{Gpu, empty, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::span,
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
};

const OP: &str = "gated_activation";

/// The function of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `z / (1 + exp(-z))`.
    Silu,
    /// `z (1 + tanh(sqrt(2/π) (z + 0.044715 z³))) / 2`.
    GeluTanh,
}

/// `act(gate) * up`, operands of one shape and dtype.
pub fn gated_activation(activation: Activation, gate: &Value, up: &Value) -> Result<Value> {
    let _span = profile::span(OP);
    if gate.tensor().shape() != up.tensor().shape() || gate.tensor().dtype() != up.tensor().dtype() {
        return Err(Error::operand(OP, "up", gate.tensor().dims(), up.tensor().dims()));
    }
    let place = place(gate.tensor(), OP)?;
    let (gate_t, up_t) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    let y = match &place {
        Place::Cpu => forward(activation, &gate_t, &up_t)?,
        Place::Gpu(gpu) => forward_on_gpu(&**gpu, activation, &gate_t, &up_t)?,
        Place::Reference => {
            return Ok(one(composite(&[gate, up], move |t| Ok(vec![reference(activation, &t[0], &t[1])?]))?));
        }
    };
    Ok(one(Value::record(vec![y], &[gate, up], move |grads| {
        let dy = only(grads, OP)?.contiguous()?;
        let (dgate, dup) = match &place {
            Place::Gpu(gpu) => backward_on_gpu(&**gpu, activation, &dy, &gate_t, &up_t)?,
            _ => backward(activation, &dy, &gate_t, &up_t)?,
        };
        Ok(vec![Some(dgate), Some(dup)])
    })))
}

fn forward(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (g, u) = (View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let mut y = room::<T>(gate.elem_count());
        let kernel = match activation {
            Activation::Silu => pmetal_cpu::swiglu_forward,
            Activation::GeluTanh => pmetal_cpu::geglu_forward,
        };
        kernel(g.slice::<T>()?, u.slice::<T>()?, &mut y);
        tensor(y, gate.shape().clone())
    })
}

fn backward(activation: Activation, dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (d, g, u) = (View::of_tensor(dy, OP)?, View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let (mut dgate, mut dup) = (room::<T>(gate.elem_count()), room::<T>(gate.elem_count()));
        let kernel = match activation {
            Activation::Silu => pmetal_cpu::swiglu_backward,
            Activation::GeluTanh => pmetal_cpu::geglu_backward,
        };
        kernel(d.slice::<T>()?, g.slice::<T>()?, u.slice::<T>()?, &mut dgate, &mut dup);
        Ok((tensor(dgate, gate.shape().clone())?, tensor(dup, gate.shape().clone())?))
    })
}

fn forward_on_gpu(gpu: &dyn Gpu, activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let y = empty(gate.shape(), gate.dtype(), gate.device())?;
    let (n, quads, grid) = span(&[gate, up]);
    let params = kernels::GateParams { n, quads };
    match activation {
        Activation::Silu => kernels::swiglu(gpu, gate.dtype(), grid, gate, up, &y, params)?,
        Activation::GeluTanh => kernels::geglu(gpu, gate.dtype(), grid, gate, up, &y, params)?,
    }
    Ok(y)
}

fn backward_on_gpu(
    gpu: &dyn Gpu,
    activation: Activation,
    dy: &Tensor,
    gate: &Tensor,
    up: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let room = || empty(gate.shape(), gate.dtype(), gate.device());
    let (dgate, dup) = (room()?, room()?);
    let (n, quads, grid) = span(&[dy, gate, up]);
    let (dtype, params) = (gate.dtype(), kernels::GateParams { n, quads });
    match activation {
        Activation::Silu => kernels::swiglu_backward(gpu, dtype, grid, dy, gate, up, &dgate, &dup, params)?,
        Activation::GeluTanh => kernels::geglu_backward(gpu, dtype, grid, dy, gate, up, &dgate, &dup, params)?,
    }
    Ok((dgate, dup))
}

/// The formula in plain candle.
fn reference(activation: Activation, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
    let act = match activation {
        Activation::Silu => (gate / (gate.neg()?.exp()? + 1.0)?)?,
        Activation::GeluTanh => {
            let inner = ((gate + ((gate.sqr()? * gate)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
            ((gate * (inner.tanh()? + 1.0)?)? * 0.5)?
        }
    };
    act * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_op, random};

    #[test]
    fn gated_activations_and_their_gradients() {
        for (activation, shape) in
            [Activation::Silu, Activation::GeluTanh].iter().flat_map(|&a| [[1, 1], [3, 19], [2, 520]].map(|s| (a, s)))
        {
            check_op(
                &[(random(&shape, 1) * 4.0).unwrap(), random(&shape, 2)],
                move |t| Ok(vec![reference(activation, &t[0], &t[1])?]),
                |v| Ok(vec![gated_activation(activation, &v[0], &v[1])?]),
            );
        }
    }
}
