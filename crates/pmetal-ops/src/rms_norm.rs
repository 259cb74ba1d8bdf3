//! Root-mean-square norm, alone and with the residual sum before it.
//!
//! `y = round(x / sqrt(mean(x²) + eps)) * weight` over the last dimension of `x [rows, width]`; statistics in f32, the normalised
//! value rounded to the dtype of `x` before it meets the weight, as Llama-like models do. Source: Zhang and Sennrich, "Root Mean Square Layer
//! Normalization", 2019.

use candle_core::{D, DType, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one},
    elementwise::{column_grid, column_sums, converted, in_octets, pitch_of, readable, row_groups, rows_in_quads},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
    rows::{GradPlace, SpareRows, empty_rows},
};

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
}

/// The norm of `x [rows, width]` with `weight [width]` (any float dtype); on a GPU with `spare` free columns behind each row.
pub fn rms_norm(x: &Value, weight: &Value, norm: RmsNorm, spare: usize) -> Result<Value> {
    Ok(rms_norm_beside(x, weight, norm, spare)?.1)
}

/// `x` itself and its norm, as [`rms_norm`]: what else the first leads to adds its gradient where that of the norm is formed.
pub fn rms_norm_beside(x: &Value, weight: &Value, norm: RmsNorm, spare: usize) -> Result<(Value, Value)> {
    let _span = profile::span(OP);
    let width = check(x, weight)?;
    let place = place_of_rows(x.tensor(), width, norm)?;
    let (x_t, weight_t) = (operand(&place, x.tensor())?, weight.tensor().contiguous()?);
    let eps = norm.eps as f32;
    let (y, rstd, room) = match &place {
        Place::Cpu => {
            let (y, rstd) = forward(&x_t, &weight_t, eps, width)?;
            (y, rstd, None)
        }
        Place::Gpu(gpu) => {
            let (y, rstd) = forward_on_gpu(&**gpu, &x_t, &weight_t, eps, spare)?;
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
        let saved = Saved { x: x_t, weight: weight_t, rstd, grad_place };
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
    let place = place_of_rows(x.tensor(), width, norm)?;
    let (x_t, residual_t) = (operand(&place, x.tensor())?, operand(&place, residual.tensor())?);
    let weight_t = weight.tensor().contiguous()?;
    let eps = norm.eps as f32;
    let (sum, y, rstd, room) = match &place {
        Place::Cpu => {
            let (sum, y, rstd) = add_forward(&x_t, &residual_t, &weight_t, eps, width)?;
            (sum, y, rstd, None)
        }
        Place::Gpu(gpu) => {
            let (sum, y, rstd) = add_forward_on_gpu(&**gpu, &x_t, &residual_t, &weight_t, eps, spare)?;
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
    let saved = Saved { x: sum.clone(), weight: weight_t, rstd, grad_place: x.grad_place() };
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

/// What the backward needs: what was normalised, the weight, `1 / sqrt(mean(x²) + eps)` of each row (f32), and where the gradient goes.
struct Saved {
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_place: GradPlace,
}

fn forward(x: &Tensor, weight: &Tensor, eps: f32, width: usize) -> Result<(Tensor, Tensor)> {
    let (xv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = room(x.elem_count() / width);
    for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut y = room::<T>(x.elem_count());
        pmetal_cpu::rms_norm_forward(xv.slice::<T>()?, wv.slice::<W>()?, eps, width, &mut y, &mut rstd);
        let rows = rstd.len();
        Ok((tensor(y, x.shape().clone())?, tensor(rstd, rows)?))
    }))
}

fn add_forward(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
    width: usize,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (xv, rv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(residual, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = room(x.elem_count() / width);
    for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let (mut sum, mut y) = (room::<T>(x.elem_count()), room::<T>(x.elem_count()));
        let (xs, rs, ws) = (xv.slice::<T>()?, rv.slice::<T>()?, wv.slice::<W>()?);
        pmetal_cpu::add_rms_norm_forward(xs, rs, ws, eps, width, &mut sum, &mut y, &mut rstd);
        let rows = rstd.len();
        Ok((tensor(sum, x.shape().clone())?, tensor(y, x.shape().clone())?, tensor(rstd, rows)?))
    }))
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
        Place::Gpu(gpu) => backward_on_gpu(&**gpu, &dy, saved, dsum.as_ref(), needs_weight)?,
        _ => backward_on_cpu(&dy, saved, dsum.as_ref(), needs_weight)?,
    };
    profile::moved(&[&dy, &saved.x, &dx]);
    profile::moved(&dsum.iter().collect::<Vec<_>>());
    Ok((dx, dweight))
}

fn backward_on_cpu(
    dy: &Tensor,
    Saved { x, weight, rstd, .. }: &Saved,
    dsum: Option<&Tensor>,
    needs_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let width = weight.elem_count();
    let (dyv, xv, wv) = (View::of_tensor(dy, OP)?, View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let rstdv = View::of_tensor(rstd, OP)?;
    let dsv = dsum.map(|d| View::of_tensor(d, OP)).transpose()?;
    let mut dweight = needs_weight.then(|| vec![0f32; width]);
    let dx = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut dx = room::<T>(x.elem_count());
        let dsum = dsv.as_ref().map(|d| d.slice::<T>()).transpose()?;
        pmetal_cpu::rms_norm_backward(
            dyv.slice::<T>()?, xv.slice::<T>()?, wv.slice::<W>()?, rstdv.slice::<f32>()?, width, dsum, &mut dx,
            dweight.as_deref_mut(),
        );
        tensor(dx, x.shape().clone())
    }))?;
    Ok((dx, dweight.map(|d| tensor(d, width)).transpose()?))
}

/// Elements of a row that a thread of the kernels holds.
const PER_THREAD: usize = 16;

/// Threads of a threadgroup: so many have the registers for what they hold, on every GPU.
const MAX_THREADS: usize = 512;

/// SIMD groups of a threadgroup that has a row for each.
const ROWS: usize = 4;

/// As [`place`]; rows that no threadgroup holds go the reference path.
fn place_of_rows(x: &Tensor, width: usize, norm: RmsNorm) -> Result<Place> {
    Ok(match place(x, OP)? {
        _ if !norm.is_plain() => Place::Reference,
        Place::Gpu(_) if width > PER_THREAD * MAX_THREADS => Place::Reference,
        place => place,
    })
}

/// The kernels' grid, and 1 where a threadgroup has one row, 0 where each of its SIMD groups has one.
fn grid_of_rows(rows: usize, width: usize) -> (Grid, u32) {
    match width.div_ceil(PER_THREAD).next_multiple_of(32) {
        32 => (Grid::line(rows.div_ceil(ROWS), 32 * ROWS), 0),
        threads => (Grid::line(rows, threads), 1),
    }
}

fn forward_on_gpu(gpu: &dyn Gpu, x: &Tensor, weight: &Tensor, eps: f32, spare: usize) -> Result<(SpareRows, Tensor)> {
    let (rows, width) = x.dims2()?;
    let weight = converted(weight, x.dtype())?;
    let y = empty_rows(rows, width, spare, x.dtype(), x.device())?;
    let rstd = empty(rows, DType::F32, x.device())?;
    let (grid, wide) = grid_of_rows(rows, width);
    let params = kernels::RmsNormParams {
        rows: rows as u32,
        width: width as u32,
        wide,
        aligned: in_octets(&[x, &weight, &y.rows]),
        x_pitch: pitch_of(x),
        residual_pitch: 0,
        y_pitch: pitch_of(&y.rows),
        eps,
    };
    kernels::rms_norm(gpu, x.dtype(), grid, x, &weight, &y.rows, &rstd, params)?;
    Ok((y, rstd))
}

fn add_forward_on_gpu(
    gpu: &dyn Gpu,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
    spare: usize,
) -> Result<(Tensor, SpareRows, Tensor)> {
    let (rows, width) = x.dims2()?;
    let weight = converted(weight, x.dtype())?;
    let y = empty_rows(rows, width, spare, x.dtype(), x.device())?;
    let (sum, rstd) = (empty((rows, width), x.dtype(), x.device())?, empty(rows, DType::F32, x.device())?);
    let (grid, wide) = grid_of_rows(rows, width);
    let params = kernels::RmsNormParams {
        rows: rows as u32,
        width: width as u32,
        wide,
        aligned: in_octets(&[x, residual, &weight, &y.rows]),
        x_pitch: pitch_of(x),
        residual_pitch: pitch_of(residual),
        y_pitch: pitch_of(&y.rows),
        eps,
    };
    kernels::add_rms_norm(gpu, x.dtype(), grid, x, residual, &weight, &sum, &y.rows, &rstd, params)?;
    Ok((sum, y, rstd))
}

fn backward_on_gpu(
    gpu: &dyn Gpu,
    dy: &Tensor,
    Saved { x, weight, rstd, grad_place }: &Saved,
    dsum: Option<&Tensor>,
    needs_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, width) = x.dims2()?;
    let weight = converted(weight, x.dtype())?;
    let dx = grad_place.empty((rows, width), x.dtype(), x.device())?;
    let (has_dsum, dsum) = (u32::from(dsum.is_some()), dsum.unwrap_or(dy));
    let (grid, wide) = grid_of_rows(rows, width);
    let params = kernels::RmsNormBackwardParams {
        rows: rows as u32,
        width: width as u32,
        wide,
        aligned: in_octets(&[dy, x, &weight, dsum, &dx]),
        has_dsum,
        dy_pitch: pitch_of(dy),
        x_pitch: pitch_of(x),
        dsum_pitch: pitch_of(dsum),
        dx_pitch: pitch_of(&dx),
    };
    kernels::rms_norm_backward(gpu, x.dtype(), grid, dy, x, &weight, rstd, dsum, &dx, params)?;
    let dweight = needs_weight.then(|| weight_grad_on_gpu(gpu, dy, x, rstd)).transpose()?;
    Ok((dx, dweight))
}

/// `[width]` f32: the sum over rows of `dy * x * rstd`, all of `[rows, width]` but `rstd [rows]`.
pub(crate) fn weight_grad_on_gpu(gpu: &dyn Gpu, dy: &Tensor, x: &Tensor, rstd: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (rows_per_group, groups) = row_groups(rows);
    let partial = empty((groups, width), DType::F32, x.device())?;
    let dweight = empty(width, DType::F32, x.device())?;
    let params = kernels::RmsNormWeightParams {
        rows: rows as u32,
        width: width as u32,
        rows_per_group,
        aligned: rows_in_quads(width, &[dy, x]),
        dy_pitch: pitch_of(dy),
        x_pitch: pitch_of(x),
    };
    kernels::rms_norm_weight_grad(gpu, x.dtype(), column_grid(width, groups), dy, x, rstd, &partial, params)?;
    column_sums(gpu, &partial, &dweight, false)?;
    Ok(dweight)
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
