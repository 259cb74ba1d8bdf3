//! The gate of a Llama-like MLP: `y = silu(gate) * up`, `silu(z) = z / (1 + exp(-z))`.
//!
//! Source: Shazeer, "GLU Variants Improve Transformer", 2020. Operands `[tokens, intermediate]`.

use candle_core::Tensor;

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    kernel::{View, for_dtype, has_cpu_kernel, room, tensor},
};

const OP: &str = "swiglu";

/// `silu(gate) * up`, operands of one shape and dtype.
pub fn swiglu(gate: &Value, up: &Value) -> Result<Value> {
    if gate.tensor().shape() != up.tensor().shape() || gate.tensor().dtype() != up.tensor().dtype() {
        return Err(Error::operand(OP, "up", gate.tensor().dims(), up.tensor().dims()));
    }
    if !has_cpu_kernel(gate.tensor()) {
        return Ok(one(composite(&[gate, up], |t| Ok(vec![reference(&t[0], &t[1])?]))?));
    }
    let (gate_t, up_t) = (gate.tensor().contiguous()?, up.tensor().contiguous()?);
    let y = forward(&gate_t, &up_t)?;
    Ok(one(Value::record(vec![y], &[gate, up], move |grads| {
        let (dgate, dup) = backward(&only(grads, OP)?, &gate_t, &up_t)?;
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
    let dy = dy.contiguous()?;
    let (d, g, u) = (View::of_tensor(&dy, OP)?, View::of_tensor(gate, OP)?, View::of_tensor(up, OP)?);
    for_dtype!(OP, gate.dtype(), T => {
        let (mut dgate, mut dup) = (room::<T>(gate.elem_count()), room::<T>(gate.elem_count()));
        pmetal_cpu::swiglu_backward(d.slice::<T>()?, g.slice::<T>()?, u.slice::<T>()?, &mut dgate, &mut dup);
        Ok((tensor(dgate, gate.shape().clone())?, tensor(dup, gate.shape().clone())?))
    })
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
        check_op(
            &[random(&[3, 19], 1), random(&[3, 19], 2)],
            |t| Ok(vec![reference(&t[0], &t[1])?]),
            |v| Ok(vec![swiglu(&v[0], &v[1])?]),
        );
    }
}
