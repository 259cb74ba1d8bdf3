//! Root-mean-square norm, alone and with the residual sum before it.
//!
//! `y = round(x / sqrt(mean(x²) + eps)) * weight` over the last dimension of `x [rows, width]`; statistics in f32, the normalised
//! value rounded to the dtype of `x` before it meets the weight, as Llama-like models do. Source: Zhang and Sennrich, "Root Mean Square Layer
//! Normalization", 2019.

use candle_core::{D, DType, Tensor};

use crate::{
    Error, Result,
    autograd::{Value, composite, one},
    kernel::{View, for_dtype, has_cpu_kernel, room, tensor},
};

const OP: &str = "rms_norm";

/// The norm of `x [rows, width]` with `weight [width]` (any float dtype).
pub fn rms_norm(x: &Value, weight: &Value, eps: f64) -> Result<Value> {
    let width = check(x, weight)?;
    if !has_cpu_kernel(x.tensor()) {
        return Ok(one(composite(&[x, weight], move |t| Ok(vec![reference(&t[0], &t[1], eps)?]))?));
    }
    let x_t = x.tensor().contiguous()?;
    let weight_t = weight.tensor().contiguous()?;
    let (y, rstd) = forward(&x_t, &weight_t, eps as f32, width)?;
    let needs = [x.requires_grad(), weight.requires_grad()];
    Ok(one(Value::record(vec![y], &[x, weight], move |grads| {
        let dy = crate::autograd::only(grads, OP)?;
        let (dx, dweight) = backward(&dy, &x_t, &weight_t, &rstd, None, needs[1])?;
        Ok(vec![needs[0].then_some(dx), dweight])
    })))
}

/// `sum = x + residual` and its norm, both `[rows, width]`: returns `(sum, norm)`.
pub fn add_rms_norm(x: &Value, residual: &Value, weight: &Value, eps: f64) -> Result<(Value, Value)> {
    let width = check(x, weight)?;
    if x.tensor().shape() != residual.tensor().shape() || x.tensor().dtype() != residual.tensor().dtype() {
        return Err(Error::operand(OP, "residual", x.tensor().dims(), residual.tensor().dims()));
    }
    if !has_cpu_kernel(x.tensor()) {
        let mut outputs = composite(&[x, residual, weight], move |t| {
            let sum = (&t[0] + &t[1])?;
            let y = reference(&sum, &t[2], eps)?;
            Ok(vec![sum, y])
        })?
        .into_iter();
        return pair(&mut outputs);
    }
    let weight_t = weight.tensor().contiguous()?;
    let (sum, y, rstd) =
        add_forward(&x.tensor().contiguous()?, &residual.tensor().contiguous()?, &weight_t, eps as f32, width)?;
    let needs_weight = weight.requires_grad();
    let saved = sum.clone();
    let mut outputs = Value::record(vec![sum, y], &[x, residual, weight], move |grads| {
        let mut grads = grads.into_iter();
        let (dsum, dy) = (grads.next().flatten(), grads.next().flatten());
        let Some(dy) = dy else { return Ok(vec![dsum.clone(), dsum, None]) };
        let (dx, dweight) = backward(&dy, &saved, &weight_t, &rstd, dsum.as_ref(), needs_weight)?;
        Ok(vec![Some(dx.clone()), Some(dx), dweight])
    })
    .into_iter();
    pair(&mut outputs)
}

fn pair(outputs: &mut impl Iterator<Item = Value>) -> Result<(Value, Value)> {
    match (outputs.next(), outputs.next()) {
        (Some(sum), Some(y)) => Ok((sum, y)),
        _ => Err(Error::Lengths { op: OP, reason: "an output is missing".into() }),
    }
}

fn check(x: &Value, weight: &Value) -> Result<usize> {
    let (_, width) = x.tensor().dims2()?;
    match weight.tensor().dims() {
        [n] if *n == width => Ok(width),
        other => Err(Error::operand(OP, "weight", [width], other)),
    }
}

fn forward(x: &Tensor, weight: &Tensor, eps: f32, width: usize) -> Result<(Tensor, Vec<f32>)> {
    let (xv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = vec![0.0; x.elem_count() / width];
    for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut y = room::<T>(x.elem_count());
        pmetal_cpu::rms_norm_forward(xv.slice::<T>()?, wv.slice::<W>()?, eps, width, &mut y, &mut rstd);
        Ok((tensor(y, x.shape().clone())?, rstd))
    }))
}

fn add_forward(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
    width: usize,
) -> Result<(Tensor, Tensor, Vec<f32>)> {
    let (xv, rv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(residual, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = vec![0.0; x.elem_count() / width];
    for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let (mut sum, mut y) = (room::<T>(x.elem_count()), room::<T>(x.elem_count()));
        let (xs, rs, ws) = (xv.slice::<T>()?, rv.slice::<T>()?, wv.slice::<W>()?);
        pmetal_cpu::add_rms_norm_forward(xs, rs, ws, eps, width, &mut sum, &mut y, &mut rstd);
        Ok((tensor(sum, x.shape().clone())?, tensor(y, x.shape().clone())?, rstd))
    }))
}

/// The gradients of the normalised value (plus `dsum`, which reached it by another way) and of the weight.
fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    rstd: &[f32],
    dsum: Option<&Tensor>,
    needs_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let dy = dy.contiguous()?;
    let dsum = dsum.map(Tensor::contiguous).transpose()?;
    let width = weight.elem_count();
    let (dyv, xv, wv) = (View::of_tensor(&dy, OP)?, View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let dsv = dsum.as_ref().map(|d| View::of_tensor(d, OP)).transpose()?;
    let mut dweight = needs_weight.then(|| vec![0f32; width]);
    let dx = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut dx = room::<T>(x.elem_count());
        let dsum = dsv.as_ref().map(|d| d.slice::<T>()).transpose()?;
        pmetal_cpu::rms_norm_backward(
            dyv.slice::<T>()?, xv.slice::<T>()?, wv.slice::<W>()?, rstd, width, dsum, &mut dx, dweight.as_deref_mut(),
        );
        tensor(dx, x.shape().clone())
    }))?;
    Ok((dx, dweight.map(|d| tensor(d, width)).transpose()?))
}

/// The formula in plain candle.
fn reference(x: &Tensor, weight: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    let dtype = x.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = x.to_dtype(wide)?;
    let rstd = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    x.broadcast_mul(&rstd)?.to_dtype(dtype)?.broadcast_mul(&weight.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_op, random};

    #[test]
    fn norm_and_its_gradients() {
        let inputs = [random(&[5, 24], 1), random(&[24], 2)];
        check_op(&inputs, |t| Ok(vec![reference(&t[0], &t[1], 1e-5)?]), |v| Ok(vec![rms_norm(&v[0], &v[1], 1e-5)?]));
    }

    #[test]
    fn sum_and_norm_and_their_gradients() {
        let inputs = [random(&[3, 17], 1), random(&[3, 17], 2), random(&[17], 3)];
        check_op(
            &inputs,
            |t| {
                let sum = (&t[0] + &t[1])?;
                let y = reference(&sum, &t[2], 1e-6)?;
                Ok(vec![sum, y])
            },
            |v| {
                let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], 1e-6)?;
                Ok(vec![sum, y])
            },
        );
    }
}
