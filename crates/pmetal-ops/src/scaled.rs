//! Values times constants: `y = x * factor`, and `y_t = x_t * factor_t` for rows.
//!
//! Products are f32 and rounded once to the dtype of `x`; the gradient goes back times the same factors.

use std::slice::from_ref;

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, kernels};

use crate::{
    Error, Result,
    autograd::{Value, one, only},
    elementwise::{pitch_of, readable, rows_in_quads},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place, upload},
    profile,
    rows::GradPlace,
};

const OP: &str = "scaled";

/// `x * factor`, `x` of any shape.
pub fn scaled(x: &Value, factor: f64) -> Result<Value> {
    if factor == 1.0 { Ok(x.clone()) } else { multiplied(x, Factors::One(factor)) }
}

/// The rows of `x [rows, width]`, each times its own of `factors [rows]`; on a GPU `x` may be a column range of a wider matrix.
///
/// # Errors
/// Where there is not one factor for each row.
pub fn scaled_rows(x: &Value, factors: &[f32]) -> Result<Value> {
    let (rows, _) = x.tensor().dims2()?;
    if factors.len() != rows {
        return Err(Error::operand(OP, "number of factors", rows, factors.len()));
    }
    multiplied(x, Factors::Rows(factors.to_vec()))
}

enum Factors {
    One(f64),
    Rows(Vec<f32>),
}

fn multiplied(x: &Value, factors: Factors) -> Result<Value> {
    let _span = profile::span(OP);
    let y = product(x.tensor(), &factors, &GradPlace::default())?;
    profile::moved(&[x.tensor(), &y]);
    let grad_place = x.grad_place();
    Ok(one(Value::record(vec![y], &[x], move |grads| {
        let dy = only(grads, OP)?;
        profile::moved(&[&dy, &dy]);
        Ok(vec![Some(product(&dy, &factors, &grad_place)?)])
    })))
}

fn product(x: &Tensor, factors: &Factors, into: &GradPlace) -> Result<Tensor> {
    match place(x, OP)? {
        _ if x.elem_count() == 0 => Ok(x.clone()),
        Place::Cpu => {
            let x = x.contiguous()?;
            let view = View::of_tensor(&x, OP)?;
            for_dtype!(OP, x.dtype(), T => {
                let mut y = room::<T>(x.elem_count());
                let x_s = view.slice::<T>()?;
                match factors {
                    Factors::One(factor) => pmetal_cpu::scale_rows(x_s, x_s.len(), from_ref(&(*factor as f32)), &mut y),
                    Factors::Rows(factors) => pmetal_cpu::scale_rows(x_s, x_s.len() / factors.len(), factors, &mut y),
                }
                tensor(y, x.shape().clone())
            })
        }
        Place::Gpu(gpu) => on_gpu(&*gpu, x, factors, into),
        Place::Reference => reference(x, factors),
    }
}

fn on_gpu(gpu: &dyn Gpu, x: &Tensor, factors: &Factors, into: &GradPlace) -> Result<Tensor> {
    if x.rank() != 2 {
        let width = x.dims().last().copied().unwrap_or(1);
        let rows = x.reshape((x.elem_count() / width, width))?;
        return Ok(on_gpu(gpu, &rows, factors, &GradPlace::default())?.reshape(x.shape())?);
    }
    let x = readable(x)?;
    let (rows, width) = x.dims2()?;
    let y = into.empty((rows, width), x.dtype(), x.device())?;
    let grid = Grid::line(rows, width.div_ceil(4).next_multiple_of(32).clamp(32, 256));
    let quads = rows_in_quads(width, &[&x, &y]) * (width / 4) as u32;
    let (width, x_pitch, y_pitch) = (width as u32, pitch_of(&x), pitch_of(&y));
    match factors {
        Factors::One(factor) => {
            let params = kernels::ScaleParams { width, quads, x_pitch, y_pitch, factor: *factor as f32 };
            kernels::scale(gpu, x.dtype(), grid, &x, &y, params)?;
        }
        Factors::Rows(factors) => {
            let params = kernels::ScaleRowsParams { width, quads, x_pitch, y_pitch };
            kernels::scale_rows(gpu, x.dtype(), grid, &x, &upload(factors, x.device())?, &y, params)?;
        }
    }
    Ok(y)
}

/// The formula in plain candle.
fn reference(x: &Tensor, factors: &Factors) -> Result<Tensor> {
    let wide = x.to_dtype(if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?;
    let y = match factors {
        Factors::One(factor) => (&wide * *factor)?,
        Factors::Rows(factors) => {
            let column = upload(factors, x.device())?.reshape((factors.len(), 1))?;
            wide.broadcast_mul(&column.to_dtype(wide.dtype())?)?
        }
    };
    Ok(y.to_dtype(x.dtype())?)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::testing::{check_columns, check_op, random};

    const FACTORS: [f32; 5] = [0.5, -1.3, 0.0, 1.0, 3.7];

    #[test]
    fn products_and_gradients() {
        for width in [1, 7, 24] {
            let x = [random(&[5, width], 1)];
            check_op(&x, |t| Ok(vec![(&t[0] * 0.22)?]), |v| Ok(vec![scaled(&v[0], 0.22)?]));
            let rows = |t: &[Tensor]| {
                let column = Tensor::new(&FACTORS, t[0].device())?.to_dtype(t[0].dtype())?.reshape((5, 1))?;
                Ok(vec![t[0].broadcast_mul(&column)?])
            };
            check_op(&x, rows, |v| Ok(vec![scaled_rows(&v[0], &FACTORS)?]));
        }
        check_op(&[random(&[2, 3, 5], 1)], |t| Ok(vec![(&t[0] * 3.0)?]), |v| Ok(vec![scaled(&v[0], 3.0)?]));
    }

    #[test]
    fn columns_of_wider_matrices() {
        let x = [random(&[5, 24], 1)];
        check_columns(&x, &[0], |v| Ok(vec![scaled_rows(&v[0], &FACTORS)?]));
        check_columns(&x, &[0], |v| Ok(vec![scaled(&v[0], 0.22)?]));
    }

    #[test]
    fn a_factor_is_not_rounded_to_the_dtype() {
        let x = Tensor::new(&[[bf16::from_f32(51.0)]], &candle_core::Device::Cpu).unwrap();
        let y = scaled(&Value::constant(x), 0.22).unwrap();
        let want = bf16::from_f32(51.0 * 0.22);
        assert_ne!(want, bf16::from_f32(51.0) * bf16::from_f32(0.22));
        assert_eq!(y.tensor().to_vec2::<bf16>().unwrap(), [[want]]);
    }

    #[test]
    fn factors_for_other_rows_are_refused() {
        assert!(scaled_rows(&Value::constant(random(&[2, 3], 1)), &FACTORS).is_err());
    }
}
