//! Root-mean-square norm, alone and with the residual sum before it.
//!
//! `y = round(x / sqrt(mean(x²) + eps)) * weight` over the last dimension of `x [rows, width]`; statistics in f32, the normalised
//! value rounded to the dtype of `x` before it meets the weight, as Llama-like models do. Source: Zhang and Sennrich, "Root Mean Square Layer
//! Normalization", 2019.

mod cpu;
mod gpu;

use candle_core::{D, DType, Tensor};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{converted, readable},
    place::{Place, place},
    profile,
    rows::{GradPlace, SpareRows},
};

pub(crate) use gpu::weight_grad as weight_grad_on_gpu;

const OP: &str = "rms_norm";

/// What a root-mean-square norm is beside its weight: `y = x * rstd * (weight_offset + weight)`, `rstd = 1 / sqrt(mean(x²) + eps)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean of the squares.
    pub eps: f64,
    /// Added to the weight: 1 where a checkpoint holds what the weight is above 1.
    pub weight_offset: f32,
    /// Whether the normalised value is rounded to the dtype of `x` before it meets the weight, and not the product alone.
    pub rounds_first: bool,
}

impl RmsNorm {
    /// The norm of most models: the weight as it is, behind a rounding.
    pub const fn new(eps: f64) -> Self {
        Self { eps, weight_offset: 0.0, rounds_first: true }
    }

    /// Whether it is what [`RmsNorm::new`] makes.
    pub(crate) fn is_plain(self) -> bool {
        self.weight_offset == 0.0 && self.rounds_first
    }

    /// The weight as kernels take it. On a GPU it has the `dtype` of activations, or is f32 and without its offset where the norm is not
    /// plain.
    pub(crate) fn weight(self, place: &Place, weight: &Tensor, dtype: DType) -> Result<Tensor> {
        Ok(match place {
            Place::Gpu(_) => converted(&weight.contiguous()?, if self.is_plain() { dtype } else { DType::F32 })?,
            Place::Cpu if self.weight_offset != 0.0 => {
                (weight.to_dtype(DType::F32)? + f64::from(self.weight_offset))?.contiguous()?
            }
            _ => weight.contiguous()?,
        })
    }
}

/// The norm of `x [rows, width]` with `weight [width]` (any float dtype); on a GPU with `spare` free columns behind each row.
pub fn rms_norm(x: &Value, weight: &Value, norm: RmsNorm, spare: usize) -> Result<Value> {
    Ok(rms_norm_beside(x, weight, norm, spare)?.1)
}

/// `x` itself and its norm, as [`rms_norm`]: what else the first leads to adds its gradient where that of the norm is formed.
pub fn rms_norm_beside(x: &Value, weight: &Value, norm: RmsNorm, spare: usize) -> Result<(Value, Value)> {
    let _span = profile::span(OP);
    let width = check(x, weight)?;
    let place = place_of_rows(x.tensor(), width)?;
    let (x_t, weight_t) = (operand(&place, x.tensor())?, norm.weight(&place, weight.tensor(), x.tensor().dtype())?);
    let (y, rstd, room) = match &place {
        Place::Cpu => {
            let (y, rstd) = cpu::forward(&x_t, &weight_t, norm)?;
            (y, rstd, None)
        }
        Place::Gpu(gpu) => {
            let (y, rstd) = gpu::forward(&**gpu, &x_t, &weight_t, norm, spare)?;
            (y.rows.clone(), rstd, Some(y))
        }
        Place::Reference => {
            let y = one(composite(&[x, weight], move |t| Ok(vec![reference(&t[0], &t[1], norm)?]))?);
            return Ok((x.clone(), y));
        }
    };
    profile::moved(&[&x_t, &y]);
    let (needs, grad_place) = ([x.requires_grad(), weight.requires_grad()], x.grad_place());
    let mut outputs = Value::record(vec![x_t.clone(), y], &[x, weight], move |grads| {
        let mut grads = grads.into_iter();
        let (beside, dy) = (grads.next().flatten(), grads.next().flatten());
        let Some(dy) = dy else { return Ok(vec![beside, None]) };
        let saved = Saved { x: x_t, weight: weight_t, norm, rstd, grad_place };
        let (dx, dweight) = backward(&place, &dy, &saved, beside.as_ref(), needs[1])?;
        Ok(vec![needs[0].then_some(dx), dweight])
    })
    .into_iter();
    let (x, y) = pair(&mut outputs)?;
    Ok((x, attached(room, y)))
}

/// `sum = x + residual` and its norm, both `[rows, width]`: returns `(sum, norm)`, on a GPU the norm with `spare` free columns behind each
/// row.
pub fn add_rms_norm(
    x: &Value,
    residual: &Value,
    weight: &Value,
    norm: RmsNorm,
    spare: usize,
) -> Result<(Value, Value)> {
    let _span = profile::span("add_rms_norm");
    let width = check(x, weight)?;
    if x.tensor().shape() != residual.tensor().shape() || x.tensor().dtype() != residual.tensor().dtype() {
        return Err(Error::operand(OP, "residual", x.tensor().dims(), residual.tensor().dims()));
    }
    let place = place_of_rows(x.tensor(), width)?;
    let (x_t, residual_t) = (operand(&place, x.tensor())?, operand(&place, residual.tensor())?);
    let weight_t = norm.weight(&place, weight.tensor(), x.tensor().dtype())?;
    let (sum, y, rstd, room) = match &place {
        Place::Cpu => {
            let (sum, y, rstd) = cpu::add_forward(&x_t, &residual_t, &weight_t, norm)?;
            (sum, y, rstd, None)
        }
        Place::Gpu(gpu) => {
            let (sum, y, rstd) = gpu::add_forward(&**gpu, &x_t, &residual_t, &weight_t, norm, spare)?;
            (sum, y.rows.clone(), rstd, Some(y))
        }
        Place::Reference => {
            let outputs = composite(&[x, residual, weight], move |t| {
                let sum = (&t[0] + &t[1])?;
                let y = reference(&sum, &t[2], norm)?;
                Ok(vec![sum, y])
            })?;
            return pair(&mut outputs.into_iter());
        }
    };
    profile::moved(&[&x_t, &residual_t, &sum, &y]);
    let needs_weight = weight.requires_grad();
    let saved = Saved { x: sum.clone(), weight: weight_t, norm, rstd, grad_place: x.grad_place() };
    let mut outputs = Value::record(vec![sum, y], &[x, residual, weight], move |grads| {
        let mut grads = grads.into_iter();
        let (dsum, dy) = (grads.next().flatten(), grads.next().flatten());
        let Some(dy) = dy else { return Ok(vec![dsum.clone(), dsum, None]) };
        let (dx, dweight) = backward(&place, &dy, &saved, dsum.as_ref(), needs_weight)?;
        Ok(vec![Some(dx.clone()), Some(dx), dweight])
    })
    .into_iter();
    let (sum, y) = pair(&mut outputs)?;
    Ok((sum, attached(room, y)))
}

/// The norm of every head of `x [rows, heads * width]` with `weight [width]` (any float dtype).
pub fn rms_norm_heads(x: &Value, weight: &Value, norm: RmsNorm) -> Result<Value> {
    let ((rows, columns), width) = (x.tensor().dims2()?, weight.tensor().elem_count());
    if width == 0 || !columns.is_multiple_of(width) {
        return Err(Error::operand(OP, "columns", format_args!("a multiple of {width}"), columns));
    }
    let heads = reshaped(x, (rows * columns / width, width))?;
    reshaped(&rms_norm(&heads, weight, norm, 0)?, (rows, columns))
}

fn reshaped(x: &Value, shape: (usize, usize)) -> Result<Value> {
    let before = x.tensor().dims2()?;
    let y = x.tensor().contiguous()?.reshape(shape)?;
    Ok(one(Value::record(vec![y], &[x], move |grads| Ok(vec![Some(only(grads, OP)?.contiguous()?.reshape(before)?)]))))
}

/// An operand as kernels read it.
fn operand(place: &Place, x: &Tensor) -> Result<Tensor> {
    match place {
        Place::Gpu(_) => readable(x),
        _ => Ok(x.contiguous()?),
    }
}

fn attached(room: Option<SpareRows>, value: Value) -> Value {
    match room {
        Some(room) => room.attach(value),
        None => value,
    }
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

/// What the backward needs: what was normalised, the weight as kernels take it, the norm, `1 / sqrt(mean(x²) + eps)` of each row (f32), and where the gradient goes.
struct Saved {
    x: Tensor,
    weight: Tensor,
    norm: RmsNorm,
    rstd: Tensor,
    grad_place: GradPlace,
}

/// The gradients of the normalised value (plus `dsum`, which reached it by another way) and of the weight.
fn backward(
    place: &Place,
    dy: &Tensor,
    saved: &Saved,
    dsum: Option<&Tensor>,
    needs_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let dy = operand(place, dy)?;
    let dsum = dsum.map(|dsum| operand(place, dsum)).transpose()?;
    let (dx, dweight) = match place {
        Place::Gpu(gpu) => gpu::backward(&**gpu, &dy, saved, dsum.as_ref(), needs_weight)?,
        _ => cpu::backward(&dy, saved, dsum.as_ref(), needs_weight)?,
    };
    profile::moved(&[&dy, &saved.x, &dx]);
    profile::moved(&dsum.iter().collect::<Vec<_>>());
    Ok((dx, dweight))
}

/// As [`place`]; rows that no threadgroup holds go the reference path.
fn place_of_rows(x: &Tensor, width: usize) -> Result<Place> {
    Ok(match place(x, OP)? {
        Place::Gpu(_) if width > gpu::WIDEST => Place::Reference,
        place => place,
    })
}

/// The formula in plain candle.
pub(crate) fn reference(x: &Tensor, weight: &Tensor, norm: RmsNorm) -> candle_core::Result<Tensor> {
    let dtype = x.dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let x = x.to_dtype(wide)?;
    let rstd = (x.sqr()?.mean_keepdim(D::Minus1)? + norm.eps)?.sqrt()?.recip()?;
    let (normed, weight) = (x.broadcast_mul(&rstd)?, (weight.to_dtype(wide)? + f64::from(norm.weight_offset))?);
    let normed = if norm.rounds_first { normed.to_dtype(dtype)?.to_dtype(wide)? } else { normed };
    normed.broadcast_mul(&weight)?.to_dtype(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_columns, check_op, emulated, random};

    #[test]
    fn columns_of_wider_matrices() {
        for (rows, width) in SHAPES {
            let inputs = [random(&[rows, width], 1), random(&[rows, width], 2), random(&[width], 3)];
            let [x, weight] = [0, 2].map(|i: usize| inputs[i].clone());
            check_columns(&[x, weight], &[0], |v| Ok(vec![rms_norm(&v[0], &v[1], RmsNorm::new(1e-6), 8)?]));
            check_columns(&inputs, &[0], |v| {
                let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], RmsNorm::new(1e-6), 8)?;
                Ok(vec![sum, y])
            });
        }
    }

    /// Rows to a SIMD group and to a threadgroup, in fours and not, one and many.
    const SHAPES: [(usize, usize); 8] = [(1, 1), (5, 24), (3, 17), (70, 6), (2, 128), (9, 130), (3, 1030), (1, 2056)];

    #[test]
    fn norm_and_its_gradients() {
        for ((rows, width), spare) in SHAPES.iter().flat_map(|&shape| [0, 16].map(|spare| (shape, spare))) {
            let inputs = [random(&[rows, width], 1), random(&[width], 2)];
            let formula = |t: &[Tensor]| Ok(vec![reference(&t[0], &t[1], RmsNorm::new(1e-5))?]);
            check_op(&inputs, formula, move |v| Ok(vec![rms_norm(&v[0], &v[1], RmsNorm::new(1e-5), spare)?]));
        }
    }

    /// The weight as it is behind no rounding, what is above 1, and that behind a rounding.
    const NOT_PLAIN: [RmsNorm; 3] = [
        RmsNorm { eps: 1e-5, weight_offset: 0.0, rounds_first: false },
        RmsNorm { eps: 1e-5, weight_offset: 1.0, rounds_first: false },
        RmsNorm { eps: 1e-5, weight_offset: 0.5, rounds_first: true },
    ];

    #[test]
    fn norms_with_offsets_and_late_rounding_and_their_gradients() {
        for ((rows, width), norm) in SHAPES.iter().flat_map(|&shape| NOT_PLAIN.map(|norm| (shape, norm))) {
            let inputs = [random(&[rows, width], 1), random(&[rows, width], 2), random(&[width], 3)];
            let both = |v: &[Value]| {
                let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], norm, 8)?;
                Ok(vec![sum, y, rms_norm(&v[1], &v[2], norm, 0)?])
            };
            check_columns(&inputs, &[0], both);
            let formula = move |t: &[Tensor]| {
                let sum = (&t[0] + &t[1])?;
                let y = reference(&sum, &t[2], norm)?;
                Ok(vec![sum, y, reference(&t[1], &t[2], norm)?])
            };
            check_op(&inputs, formula, both);
        }
    }

    /// Every digit of a wide weight counts where the product alone is rounded.
    #[test]
    fn a_weight_wider_than_activations_is_not_rounded() {
        let x = random(&[3, 40], 1).to_dtype(DType::BF16).unwrap();
        let weight = random(&[40], 2).to_dtype(DType::F32).unwrap();
        let norm = NOT_PLAIN[0];
        let of = |weight: &Tensor| reference(&x, weight, norm).unwrap();
        let differing = |a: &Tensor, b: &Tensor| {
            let [a, b] =
                [a, b].map(|t| t.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap());
            a.iter().zip(&b).filter(|(a, b)| a != b).count()
        };
        let want = of(&weight);
        assert!(differing(&want, &of(&weight.to_dtype(DType::BF16).unwrap())) > 20);
        let normed = || rms_norm(&Value::constant(x.clone()), &Value::constant(weight.clone()), norm, 0).unwrap();
        for got in [normed(), emulated(normed)] {
            // but for one that lies between two roundings
            assert!(differing(&want, got.tensor()) <= 2);
        }
    }

    #[test]
    fn norms_of_heads_and_their_gradients() {
        for ((rows, heads, width), norm) in
            [(3, 1, 5), (5, 3, 8), (2, 4, 17)].iter().flat_map(|&shape| NOT_PLAIN.map(|norm| (shape, norm)))
        {
            let inputs = [random(&[rows, heads * width], 1), random(&[width], 2)];
            let formula = move |t: &[Tensor]| {
                Ok(vec![reference(&t[0].reshape(((), width))?, &t[1], norm)?.reshape((rows, heads * width))?])
            };
            check_op(&inputs, formula, |v| Ok(vec![rms_norm_heads(&v[0], &v[1], norm)?]));
        }
        let [x, weight] = [&[2, 6][..], &[4]].map(|shape| Value::constant(random(shape, 1)));
        assert!(rms_norm_heads(&x, &weight, NOT_PLAIN[0]).is_err());
    }

    #[test]
    fn a_row_too_wide_for_a_threadgroup() {
        let [x, weight] = [random(&[2, 8200], 1), random(&[8200], 2)].map(|t| t.to_dtype(DType::F32).unwrap());
        let y = emulated(|| {
            rms_norm(&Value::constant(x.clone()), &Value::constant(weight.clone()), RmsNorm::new(1e-6), 0).unwrap()
        });
        assert_close(&reference(&x, &weight, RmsNorm::new(1e-6)).unwrap(), y.tensor(), 1e-6, "norm");
    }

    #[test]
    fn sum_and_norm_and_their_gradients() {
        for ((rows, width), spare) in SHAPES.iter().flat_map(|&shape| [0, 16].map(|spare| (shape, spare))) {
            let inputs = [random(&[rows, width], 1), random(&[rows, width], 2), random(&[width], 3)];
            let formula = |t: &[Tensor]| {
                let sum = (&t[0] + &t[1])?;
                let y = reference(&sum, &t[2], RmsNorm::new(1e-6))?;
                Ok(vec![sum, y])
            };
            check_op(&inputs, formula, move |v| {
                let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], RmsNorm::new(1e-6), spare)?;
                Ok(vec![sum, y])
            });
        }
    }
}
