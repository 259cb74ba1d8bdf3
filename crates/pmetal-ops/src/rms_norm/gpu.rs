//! RMSNorm by the kernels of a GPU.

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use super::{RmsNorm, Saved};
use crate::{
    Result,
    elementwise::{column_grid, column_sums, in_octets, pitch_of, row_groups, rows_in_quads},
    rows::{SpareRows, empty_rows},
};

/// Elements of a row that a thread of the kernels holds.
const PER_THREAD: usize = 16;

/// Threads of a threadgroup: so many have the registers for what they hold, on every GPU.
const MAX_THREADS: usize = 512;

/// The widest rows that kernels take.
pub(super) const WIDEST: usize = PER_THREAD * MAX_THREADS;

/// SIMD groups of a threadgroup that has a row for each.
const ROWS: usize = 4;

/// The kernels' grid, and 1 where a threadgroup has one row, 0 where each of its SIMD groups has one.
fn grid_of_rows(rows: usize, width: usize) -> (Grid, u32) {
    match width.div_ceil(PER_THREAD).next_multiple_of(32) {
        32 => (Grid::line(rows.div_ceil(ROWS), 32 * ROWS), 0),
        threads => (Grid::line(rows, threads), 1),
    }
}

pub(super) fn forward(
    gpu: &dyn Gpu,
    x: &Tensor,
    weight: &Tensor,
    norm: RmsNorm,
    spare: usize,
) -> Result<(SpareRows, Tensor)> {
    let (rows, width) = x.dims2()?;
    let y = empty_rows(rows, width, spare, x.dtype(), x.device())?;
    let rstd = empty(rows, DType::F32, x.device())?;
    let (grid, wide) = grid_of_rows(rows, width);
    let params = kernels::RmsNormParams {
        rows: rows as u32,
        width: width as u32,
        wide,
        aligned: in_octets(&[x, weight, &y.rows]),
        x_pitch: pitch_of(x),
        residual_pitch: 0,
        y_pitch: pitch_of(&y.rows),
        rounds_first: u32::from(norm.rounds_first),
        offset: norm.weight_offset,
        eps: norm.eps as f32,
    };
    let launch = if norm.is_plain() { kernels::rms_norm } else { kernels::rms_norm_general };
    launch(gpu, x.dtype(), grid, x, weight, &y.rows, &rstd, params)?;
    Ok((y, rstd))
}

pub(super) fn add_forward(
    gpu: &dyn Gpu,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    norm: RmsNorm,
    spare: usize,
) -> Result<(Tensor, SpareRows, Tensor)> {
    let (rows, width) = x.dims2()?;
    let y = empty_rows(rows, width, spare, x.dtype(), x.device())?;
    let (sum, rstd) = (empty((rows, width), x.dtype(), x.device())?, empty(rows, DType::F32, x.device())?);
    let (grid, wide) = grid_of_rows(rows, width);
    let params = kernels::RmsNormParams {
        rows: rows as u32,
        width: width as u32,
        wide,
        aligned: in_octets(&[x, residual, weight, &y.rows]),
        x_pitch: pitch_of(x),
        residual_pitch: pitch_of(residual),
        y_pitch: pitch_of(&y.rows),
        rounds_first: u32::from(norm.rounds_first),
        offset: norm.weight_offset,
        eps: norm.eps as f32,
    };
    let launch = if norm.is_plain() { kernels::add_rms_norm } else { kernels::add_rms_norm_general };
    launch(gpu, x.dtype(), grid, x, residual, weight, &sum, &y.rows, &rstd, params)?;
    Ok((sum, y, rstd))
}

pub(super) fn backward(
    gpu: &dyn Gpu,
    dy: &Tensor,
    Saved { x, weight, norm, rstd, grad_place }: &Saved,
    dsum: Option<&Tensor>,
    needs_weight: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (rows, width) = x.dims2()?;
    let dx = grad_place.empty((rows, width), x.dtype(), x.device())?;
    let (has_dsum, dsum) = (u32::from(dsum.is_some()), dsum.unwrap_or(dy));
    let (grid, wide) = grid_of_rows(rows, width);
    let params = kernels::RmsNormBackwardParams {
        rows: rows as u32,
        width: width as u32,
        wide,
        aligned: in_octets(&[dy, x, weight, dsum, &dx]),
        has_dsum,
        dy_pitch: pitch_of(dy),
        x_pitch: pitch_of(x),
        dsum_pitch: pitch_of(dsum),
        dx_pitch: pitch_of(&dx),
        offset: norm.weight_offset,
    };
    let launch = if norm.is_plain() { kernels::rms_norm_backward } else { kernels::rms_norm_backward_general };
    launch(gpu, x.dtype(), grid, dy, x, weight, rstd, dsum, &dx, params)?;
    let dweight = needs_weight.then(|| weight_grad(gpu, dy, x, rstd, *norm)).transpose()?;
    Ok((dx, dweight))
}

/// `[width]` f32: the sum over rows of `dy * x * rstd`, the product of the last two as the norm rounds it, all of `[rows, width]` but `rstd [rows]`.
pub(crate) fn weight_grad(gpu: &dyn Gpu, dy: &Tensor, x: &Tensor, rstd: &Tensor, norm: RmsNorm) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (rows_per_group, groups) = row_groups(rows);
    let partial = empty((groups, width), DType::F32, x.device())?;
    let dweight = empty(width, DType::F32, x.device())?;
    let params = kernels::RmsNormWeightParams {
        rows: rows as u32,
        width: width as u32,
        rows_per_group,
        aligned: rows_in_quads(width, &[dy, x]),
        rounds_first: u32::from(norm.rounds_first),
        dy_pitch: pitch_of(dy),
        x_pitch: pitch_of(x),
    };
    kernels::rms_norm_weight_grad(gpu, x.dtype(), column_grid(width, groups), dy, x, rstd, &partial, params)?;
    column_sums(gpu, &partial, &dweight, false)?;
    Ok(dweight)
}
