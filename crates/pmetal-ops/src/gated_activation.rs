//! The gate of a Llama-like MLP: `y = silu(gate) * up`, `silu(z) = z / (1 + exp(-z))`.
//!
//! Source: Shazeer, "GLU Variants Improve Transformer", 2020. Operands `[tokens, intermediate]`.

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

const OP: &str = "swiglu";

/// `silu(gate) * up`, operands of one shape and dtype.
pub fn swiglu(gate: &Value, up: &Value) -> Result<Value> {
    let _span = profile::span(OP);
    if gate.tensor().shape() != up.tensor().shape() || gate.tensor().dtype() != up.tensor().dtype() {
        return Err(Error::operand(OP, "up", gate.tensor().dims(), up.tensor().dims()));
    }
    let place = place(gate.tensor(), OP)?;
    let (gate_t, up_t) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    let y = match &place {
        Place::Cpu => forward(&gate_t, &up_t)?,
        Place::Gpu(gpu) => forward_on_gpu(&**gpu, &gate_t, &up_t)?,
        Place::Reference => return Ok(one(composite(&[gate, up], |t| Ok(vec![reference(&t[0], &t[1])?]))?)),
    };
    Ok(one(Value::record(vec![y], &[gate, up], move |grads| {
        let dy = only(grads, OP)?.contiguous()?;
        let (dgate, dup) = match &place {
            Place::Gpu(gpu) => backward_on_gpu(&**gpu, &dy, &gate_t, &up_t)?,
            _ => backward(&dy, &gate_t, &up_t)?,
        };
        Ok(vec![Some(dgate), Some(dup)])
    })))
}

fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (g, u) = (View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let mut y = room::<T>(gate.elem_count());
        pmetal_cpu::swiglu_forward(g.slice::<T>()?, u.slice::<T>()?, &mut y);
        tensor(y, gate.shape().clone())
    })
}

fn backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let (d, g, u) = (View::of_tensor(dy, OP)?, View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let (mut dgate, mut dup) = (room::<T>(gate.elem_count()), room::<T>(gate.elem_count()));
        pmetal_cpu::swiglu_backward(d.slice::<T>()?, g.slice::<T>()?, u.slice::<T>()?, &mut dgate, &mut dup);
        Ok((tensor(dgate, gate.shape().clone())?, tensor(dup, gate.shape().clone())?))
    })
}

fn forward_on_gpu(gpu: &dyn Gpu, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let y = empty(gate.shape(), gate.dtype(), gate.device())?;
    let (n, quads, grid) = span(&[gate, up]);
    kernels::swiglu(gpu, gate.dtype(), grid, gate, up, &y, kernels::GateParams { n, quads })?;
    Ok(y)
}

fn backward_on_gpu(gpu: &dyn Gpu, dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    let room = || empty(gate.shape(), gate.dtype(), gate.device());
    let (dgate, dup) = (room()?, room()?);
    let (n, quads, grid) = span(&[dy, gate, up]);
    let params = kernels::GateParams { n, quads };
    kernels::swiglu_backward(gpu, gate.dtype(), grid, dy, gate, up, &dgate, &dup, params)?;
    Ok((dgate, dup))
}

/// The formula in plain candle.
fn reference(gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
    (gate / (gate.neg()?.exp()? + 1.0)?)? * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_op, random};

    #[test]
    fn swiglu_and_its_gradients() {
        for shape in [[1, 1], [3, 19], [2, 520]] {
            check_op(
                &[random(&shape, 1), random(&shape, 2)],
                |t| Ok(vec![reference(&t[0], &t[1])?]),
                |v| Ok(vec![swiglu(&v[0], &v[1])?]),
            );
        }
    }
}
