//! The norm of each head of q or k and the rotary position embedding behind it, as Qwen3 has them.
//!
//! `y = rope(rms_norm(x))` for `x [tokens, heads, head_dim]` and `weight [head_dim]`; the formulas are those of [`rms_norm`] and [`rope`].
//! Source: Qwen3's attention in Hugging Face's transformers. On a CPU it is one pass; elsewhere the two operations one after the other.

use candle_core::Tensor;
use pmetal_cpu::HeadAngles;

use crate::{
    Error, Result, RopeTable,
    autograd::{Value, one, only},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile, rms_norm, rope,
};

const OP: &str = "rms_norm_rope";

/// The norm of every head of `x [tokens, heads, head_dim]` with `weight [head_dim]` (any float dtype), turned by the angles of its token.
pub fn rms_norm_rope(x: &Value, weight: &Value, eps: f64, table: &RopeTable) -> Result<Value> {
    let _span = profile::span(OP);
    let (tokens, heads, head_dim) = x.tensor().dims3()?;
    table.check(OP, tokens, head_dim)?;
    if weight.tensor().dims() != [head_dim] {
        return Err(Error::operand(OP, "weight", [head_dim], weight.tensor().dims()));
    }
    if !matches!(place(x.tensor(), OP)?, Place::Cpu) {
        let normed = rms_norm(&x.reshape((tokens * heads, head_dim))?, weight, eps)?;
        return rope(&normed.reshape((tokens, heads, head_dim))?, table);
    }
    let (x_t, weight_t) = (x.tensor().contiguous()?, weight.tensor().contiguous()?);
    let (y, rstd) = forward(&x_t, &weight_t, eps as f32, table, heads)?;
    let (needs_x, needs_weight) = (x.requires_grad(), weight.requires_grad());
    let saved = Saved { x: x_t, weight: weight_t, rstd, table: table.clone(), heads };
    Ok(one(Value::record(vec![y], &[x, weight], move |grads| {
        let (dx, dweight) = backward(&only(grads, OP)?.contiguous()?, &saved, needs_weight)?;
        Ok(vec![needs_x.then_some(dx), dweight])
    })))
}

/// What the backward needs: what was normalised, the weight, and `1 / sqrt(mean(x²) + eps)` of each head.
struct Saved {
    x: Tensor,
    weight: Tensor,
    rstd: Vec<f32>,
    table: RopeTable,
    heads: usize,
}

fn angles(table: &RopeTable, heads: usize) -> HeadAngles<'_> {
    let (cos, sin) = table.cos_and_sin();
    HeadAngles { cos, sin, heads }
}

fn forward(x: &Tensor, weight: &Tensor, eps: f32, table: &RopeTable, heads: usize) -> Result<(Tensor, Vec<f32>)> {
    let (xv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = room::<f32>(x.elem_count() / weight.elem_count());
    let y = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut y = room::<T>(x.elem_count());
        let (xs, ws) = (xv.slice::<T>()?, wv.slice::<W>()?);
        pmetal_cpu::rms_norm_rope_forward(xs, ws, eps, angles(table, heads), &mut y, &mut rstd);
        tensor(y, x.shape().clone())
    }))?;
    Ok((y, rstd))
}

fn backward(dy: &Tensor, saved: &Saved, needs_weight: bool) -> Result<(Tensor, Option<Tensor>)> {
    let Saved { x, weight, rstd, table, heads } = saved;
    let (dyv, xv, wv) = (View::of_tensor(dy, OP)?, View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut dweight = needs_weight.then(|| vec![0f32; weight.elem_count()]);
    let dx = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut dx = room::<T>(x.elem_count());
        let (dys, xs, ws) = (dyv.slice::<T>()?, xv.slice::<T>()?, wv.slice::<W>()?);
        let dweight = dweight.as_deref_mut();
        pmetal_cpu::rms_norm_rope_backward(dys, xs, ws, rstd, angles(table, *heads), &mut dx, dweight);
        tensor(dx, x.shape().clone())
    }))?;
    let dweight = dweight.map(|d| tensor(d, weight.elem_count())).transpose()?;
    Ok((dx, dweight))
}

/// The formula in plain candle.
#[cfg(test)]
fn reference(x: &Tensor, weight: &Tensor, eps: f64, table: &RopeTable) -> candle_core::Result<Tensor> {
    crate::rope::reference(&crate::rms_norm::reference(x, weight, eps)?, table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_op, random};

    #[test]
    fn norm_and_rope_of_heads_and_their_gradients() {
        for (heads, inv_freq) in [(1, vec![0.7]), (2, vec![1.0, 0.31, 0.04]), (3, vec![0.3; 40]), (16, vec![0.5; 64])] {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &inv_freq, 1.3);
            let reference_table = table.clone();
            let head_dim = 2 * inv_freq.len();
            check_op(
                &[random(&[5, heads, head_dim], 1), random(&[head_dim], 2)],
                move |t| Ok(vec![reference(&t[0], &t[1], 1e-5, &reference_table)?]),
                |v| Ok(vec![rms_norm_rope(&v[0], &v[1], 1e-5, &table)?]),
            );
        }
    }

    #[test]
    fn a_weight_of_another_width_is_refused() {
        let table = RopeTable::new(&[0], &[1.0], 1.0);
        let [x, weight] = [random(&[1, 1, 2], 1), random(&[3], 2)].map(Value::constant);
        assert!(rms_norm_rope(&x, &weight, 1e-5, &table).is_err());
    }
}
