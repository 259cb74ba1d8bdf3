//! LayerNorm of a row, or of each of its heads.
//!
//! `y = (x - mean) / sqrt(variance + eps) * weight + bias` over every group of `width` columns; statistics and products in f32, rounded once.
//! Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.

use candle_core::{D, DType, Tensor};
use pmetal_cpu::LayerNormStatistics;
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{bias_grad, column_grid, column_sums, converted, pitch_of, readable, row_groups, rows_in_quads},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
    rows::GradPlace,
};

const OP: &str = "layer_norm";

/// The norm of every `width` columns of `x [rows, heads * width]`, with a `weight` and perhaps a `bias` (any float dtype) of `[width]`, which
/// all heads share, or of `[heads * width]`.
pub fn layer_norm(x: &Value, weight: &Value, bias: Option<&Value>, eps: f64, width: usize) -> Result<Value> {
    let _span = profile::span(OP);
    check(x, weight, bias, width)?;
    let inputs: Vec<&Value> = [x, weight].into_iter().chain(bias).collect();
    let place = place(x.tensor(), OP)?;
    let dtype = match &place {
        Place::Reference => return Ok(one(composite(&inputs, move |t| Ok(vec![reference(t, eps, width)?]))?)),
        Place::Gpu(_) => DType::F32,
        Place::Cpu => weight.tensor().dtype(),
    };
    let of_dtype = |v: &Value| converted(&v.tensor().contiguous()?, dtype);
    let (weight_t, bias_t) = (of_dtype(weight)?, bias.map(of_dtype).transpose()?);
    let groups = Groups { weight: weight_t, width, grad_place: x.grad_place() };
    let (x_t, y, [mean, rstd]) = match &place {
        Place::Gpu(gpu) => {
            let x_t = readable(x.tensor())?;
            let (y, statistics) = forward_on_gpu(&**gpu, &x_t, &groups, bias_t.as_ref(), eps as f32)?;
            (x_t, y, statistics)
        }
        _ => {
            let x_t = x.tensor().contiguous()?;
            let (y, statistics) = forward(&x_t, &groups, bias_t.as_ref(), eps as f32)?;
            (x_t, y, statistics)
        }
    };
    profile::moved(&[&x_t, &y]);
    let needs: Vec<bool> = inputs.iter().map(|input| input.requires_grad()).collect();
    let saved = Saved { x: x_t, mean, rstd, groups };
    Ok(one(Value::record(vec![y], &inputs, move |grads| {
        let dy = only(grads, OP)?;
        let (dx, dweight) = match &place {
            Place::Gpu(gpu) => backward_on_gpu(&**gpu, &readable(&dy)?, &saved, needs[1])?,
            _ => backward(&dy.contiguous()?, &saved, needs[1])?,
        };
        profile::moved(&[&dy, &saved.x, &dx]);
        let mut grads = vec![needs[0].then_some(dx), dweight];
        if let Some(&needed) = needs.get(2) {
            grads.push(needed.then(|| sum_of_rows(&dy, &saved)).transpose()?);
        }
        Ok(grads)
    })))
}

fn check(x: &Value, weight: &Value, bias: Option<&Value>, width: usize) -> Result<()> {
    let (_, columns) = x.tensor().dims2()?;
    if width == 0 || !columns.is_multiple_of(width) {
        return Err(Error::operand(OP, "columns", format_args!("a multiple of {width}"), columns));
    }
    match weight.tensor().dims() {
        [n] if *n == width || *n == columns => {}
        other => return Err(Error::operand(OP, "weight", format_args!("[{width}] or [{columns}]"), other)),
    }
    match bias.map(|bias| bias.tensor().dims()) {
        Some(dims) if dims != weight.tensor().dims() => Err(Error::operand(OP, "bias", weight.tensor().dims(), dims)),
        _ => Ok(()),
    }
}

/// What the groups of a row are: their weight as kernels take it, their columns, and where the gradient goes.
struct Groups {
    weight: Tensor,
    width: usize,
    grad_place: GradPlace,
}

/// What the backward needs: what was normalised, and mean and `1 / sqrt(variance + eps)` of each group (f32).
struct Saved {
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: Groups,
}

impl Saved {
    /// Rows as long as the weight.
    fn rows_of_weight(&self, t: &Tensor) -> Result<Tensor> {
        let columns = self.groups.weight.elem_count();
        if t.dim(1)? == columns { Ok(t.clone()) } else { Ok(t.contiguous()?.reshape(((), columns))?) }
    }
}

fn forward(x: &Tensor, groups: &Groups, bias: Option<&Tensor>, eps: f32) -> Result<(Tensor, [Tensor; 2])> {
    let Groups { weight, width, .. } = groups;
    let (xv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let bv = bias.map(|bias| View::of_tensor(bias, OP)).transpose()?;
    let count = x.elem_count() / width;
    let (mut mean, mut rstd) = (room(count), room(count));
    let y = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut y = room::<T>(x.elem_count());
        let (xs, ws) = (xv.slice::<T>()?, wv.slice::<W>()?);
        let bias = bv.as_ref().map(|b| b.slice::<W>()).transpose()?;
        pmetal_cpu::layer_norm_forward(xs, ws, bias, eps, *width, &mut y, &mut mean, &mut rstd);
        tensor(y, x.shape().clone())
    }))?;
    Ok((y, [tensor(mean, count)?, tensor(rstd, count)?]))
}

/// The gradients in `x` and in the weight.
fn backward(dy: &Tensor, saved: &Saved, needs_weight: bool) -> Result<(Tensor, Option<Tensor>)> {
    let Saved { x, mean, rstd, groups: Groups { weight, width, .. } } = saved;
    let (dyv, xv, wv) = (View::of_tensor(dy, OP)?, View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let (mean, rstd) = (View::of_tensor(mean, OP)?, View::of_tensor(rstd, OP)?);
    let statistics = LayerNormStatistics { mean: mean.slice::<f32>()?, rstd: rstd.slice::<f32>()? };
    let mut dweight = needs_weight.then(|| vec![0f32; weight.elem_count()]);
    let dx = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut dx = room::<T>(x.elem_count());
        let (dys, xs) = (dyv.slice::<T>()?, xv.slice::<T>()?);
        pmetal_cpu::layer_norm_backward(dys, xs, wv.slice::<W>()?, statistics, *width, &mut dx);
        if let Some(dweight) = &mut dweight {
            pmetal_cpu::layer_norm_weight_gradient(dys, xs, statistics, *width, dweight);
        }
        tensor(dx, x.shape().clone())
    }))?;
    Ok((dx, dweight.map(|d| tensor(d, weight.elem_count())).transpose()?))
}

/// The gradient of the bias.
fn sum_of_rows(dy: &Tensor, saved: &Saved) -> Result<Tensor> {
    let dbias = Tensor::zeros(saved.groups.weight.elem_count(), DType::F32, dy.device())?;
    bias_grad(&saved.rows_of_weight(dy)?, &dbias)?;
    Ok(dbias)
}

/// Columns that a thread of the kernels takes, roughly, before a threadgroup has a group and not a SIMD group.
const PER_THREAD: usize = 16;

/// Threads of a threadgroup at most, and SIMD groups of one that has a group for each.
const MAX_THREADS: usize = 512;
const GROUPS: usize = 4;

/// The kernels' grid, and what they are told beside pitches.
fn grid(x: &Tensor, Groups { weight, width, .. }: &Groups) -> Result<(Grid, kernels::LayerNormParams)> {
    let ((rows, columns), width) = (x.dims2()?, *width);
    let (heads, wide) = (columns / width, width > 32 * PER_THREAD);
    let params = kernels::LayerNormParams {
        groups: (rows * heads) as u32,
        heads: heads as u32,
        width: width as u32,
        parts: (weight.elem_count() / width) as u32,
        wide: u32::from(wide),
        aligned: 0,
        has_bias: 0,
        dy_pitch: 0,
        x_pitch: pitch_of(x),
        y_pitch: 0,
        eps: 0.0,
    };
    let grid = match wide {
        true => Grid::line(rows * heads, width.div_ceil(PER_THREAD).next_multiple_of(32).min(MAX_THREADS)),
        false => Grid::line((rows * heads).div_ceil(GROUPS), 32 * GROUPS),
    };
    Ok((grid, params))
}

fn forward_on_gpu(
    gpu: &dyn Gpu,
    x: &Tensor,
    groups: &Groups,
    bias: Option<&Tensor>,
    eps: f32,
) -> Result<(Tensor, [Tensor; 2])> {
    let (grid, params) = grid(x, groups)?;
    let (has_bias, bias) = (u32::from(bias.is_some()), bias.unwrap_or(&groups.weight));
    let y = empty(x.dims2()?, x.dtype(), x.device())?;
    let [mean, rstd] = [(); 2].map(|()| empty(params.groups as usize, DType::F32, x.device()));
    let (mean, rstd) = (mean?, rstd?);
    let aligned = rows_in_quads(groups.width, &[x, &groups.weight, bias, &y]);
    let params = kernels::LayerNormParams { aligned, has_bias, y_pitch: pitch_of(&y), eps, ..params };
    kernels::layer_norm(gpu, x.dtype(), grid, x, &groups.weight, bias, &y, &mean, &rstd, params)?;
    Ok((y, [mean, rstd]))
}

fn backward_on_gpu(gpu: &dyn Gpu, dy: &Tensor, saved: &Saved, needs_weight: bool) -> Result<(Tensor, Option<Tensor>)> {
    let Saved { x, mean, rstd, groups } = saved;
    let (grid, params) = grid(x, groups)?;
    let dx = groups.grad_place.empty(x.dims2()?, x.dtype(), x.device())?;
    let aligned = rows_in_quads(groups.width, &[dy, x, &groups.weight, &dx]);
    let params = kernels::LayerNormParams { aligned, dy_pitch: pitch_of(dy), y_pitch: pitch_of(&dx), ..params };
    kernels::layer_norm_backward(gpu, x.dtype(), grid, dy, x, &groups.weight, mean, rstd, &dx, params)?;
    let dweight = needs_weight.then(|| weight_grad_on_gpu(gpu, dy, saved)).transpose()?;
    Ok((dx, dweight))
}

fn weight_grad_on_gpu(gpu: &dyn Gpu, dy: &Tensor, saved: &Saved) -> Result<Tensor> {
    let (dy, x) = (saved.rows_of_weight(dy)?, saved.rows_of_weight(&saved.x)?);
    let (rows, columns) = x.dims2()?;
    let (rows_per_group, row_groups) = row_groups(rows);
    let partial = empty((row_groups, columns), DType::F32, x.device())?;
    let dweight = empty(columns, DType::F32, x.device())?;
    let params = kernels::LayerNormWeightParams {
        rows: rows as u32,
        columns: columns as u32,
        width: saved.groups.width as u32,
        rows_per_group,
        dy_pitch: pitch_of(&dy),
        x_pitch: pitch_of(&x),
    };
    let (grid, Saved { mean, rstd, .. }) = (column_grid(columns, row_groups), saved);
    kernels::layer_norm_weight_grad(gpu, x.dtype(), grid, &dy, &x, mean, rstd, &partial, params)?;
    column_sums(gpu, &partial, &dweight, false)?;
    Ok(dweight)
}

/// The formula in plain candle, of x, weight and perhaps bias.
fn reference(inputs: &[Tensor], eps: f64, width: usize) -> candle_core::Result<Tensor> {
    let (x, factors) = (&inputs[0], &inputs[1..]);
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (rows, columns) = x.dims2()?;
    let groups = x.to_dtype(wide)?.reshape((rows, columns / width, width))?;
    let centred = groups.broadcast_sub(&groups.mean_keepdim(D::Minus1)?)?;
    let rstd = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    let of_groups = |t: &Tensor| t.to_dtype(wide)?.reshape((1, t.elem_count() / width, width));
    let mut y = centred.broadcast_mul(&rstd)?.broadcast_mul(&of_groups(&factors[0])?)?;
    if let Some(bias) = factors.get(1) {
        y = y.broadcast_add(&of_groups(bias)?)?;
    }
    y.reshape((rows, columns))?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_columns, check_op, random};

    /// Rows, heads, columns of a head: a SIMD group's and a threadgroup's, in fours and not, one and many.
    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (5, 2, 24), (3, 3, 17), (70, 1, 6), (2, 1, 130), (2, 2, 520), (1, 1, 1030)];

    /// Inputs of a shape: with a weight for all heads and one for each, without bias and with.
    fn inputs((rows, heads, width): (usize, usize, usize)) -> impl Iterator<Item = Vec<Tensor>> {
        [width, heads * width].into_iter().flat_map(move |n| {
            let x = (random(&[rows, heads * width], 1) + 0.3).unwrap();
            let [weight, bias] = [2, 3].map(|seed| random(&[n], seed));
            [vec![x.clone(), weight.clone()], vec![x, weight, bias]]
        })
    }

    fn of(v: &[Value], width: usize) -> Result<Vec<Value>> {
        Ok(vec![layer_norm(&v[0], &v[1], v.get(2), 1e-5, width)?])
    }

    #[test]
    fn columns_of_wider_matrices() {
        for (shape, inputs) in SHAPES.into_iter().flat_map(|shape| inputs(shape).map(move |inputs| (shape, inputs))) {
            check_columns(&inputs, &[0], |v| of(v, shape.2));
        }
    }

    #[test]
    fn norm_and_its_gradients() {
        for (shape, inputs) in SHAPES.into_iter().flat_map(|shape| inputs(shape).map(move |inputs| (shape, inputs))) {
            let width = shape.2;
            check_op(&inputs, move |t| Ok(vec![reference(t, 1e-5, width)?]), |v| of(v, width));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let value = |shape: &[usize]| Value::constant(random(shape, 1));
        for (weight, bias, width) in [(5, 5, 3), (3, 6, 3), (4, 4, 4), (3, 3, 0)] {
            let [weight, bias] = [weight, bias].map(|n| value(&[n]));
            assert!(layer_norm(&value(&[2, 6]), &weight, Some(&bias), 1e-5, width).is_err());
        }
    }
}
