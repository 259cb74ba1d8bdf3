//! Sums, conversions, biases and dropout: what the walk back, the arenas and linear layers need between operations.

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels, pitch};

use crate::{
    Error, Result,
    kernel::{View, for_dtype, room, tensor, with_slice_mut},
    place::{Place, place, upload},
    profile,
};

const OP: &str = "elementwise";

/// `y += x` in place; of one shape, float dtypes that may differ; `y` contiguous, or on a GPU rows with a pitch.
pub(crate) fn add_assign(y: &Tensor, x: &Tensor) -> Result<()> {
    let _span = profile::backward_span("add_assign");
    same_shape("add_assign", y, x)?;
    match place(y, OP)? {
        Place::Cpu => {
            let x = x.contiguous()?;
            let view = View::of_tensor(&x, "add_assign")?;
            for_dtype!("add_assign", y.dtype(), Y => for_dtype!("add_assign", x.dtype(), X => {
                let x = view.slice::<X>()?;
                with_slice_mut::<Y, _>(y, "add_assign", |y| pmetal_cpu::add_assign_mixed(y, x))
            }))
        }
        Place::Gpu(gpu) if !y.is_contiguous() => add_to_rows(&*gpu, y, &x.contiguous()?),
        Place::Gpu(gpu) => add_on_gpu(&*gpu, y, &x.contiguous()?),
        Place::Reference => Ok(y.slice_set(&(y + x.to_dtype(y.dtype())?)?, 0, 0)?),
    }
}

fn add_on_gpu(gpu: &dyn Gpu, y: &Tensor, x: &Tensor) -> Result<()> {
    let (n, quads, grid) = span(&[y, x]);
    if y.dtype() == DType::F32 {
        let params = kernels::ElementwiseParams { n, quads };
        return Ok(kernels::add_assign_f32(gpu, x.dtype(), grid, x, y, params)?);
    }
    if x.dtype() != y.dtype() {
        let sum = converted(y, DType::F32)?;
        add_on_gpu(gpu, &sum, x)?;
        return convert_into(&sum, y);
    }
    let params = kernels::ElementwiseParams { n, quads };
    Ok(kernels::add_assign(gpu, y.dtype(), grid, x, y, params)?)
}

/// [`add_on_gpu`] where `y` is rows with a pitch. It happens where a value in a group's place has several consumers, which is rare.
fn add_to_rows(gpu: &dyn Gpu, y: &Tensor, x: &Tensor) -> Result<()> {
    let (rows, width) = y.dims2()?;
    let sum = y.contiguous()?;
    add_on_gpu(gpu, &sum, x)?;
    let (x_pitch, y_pitch) = (pitch_of(&sum), pitch_of(y));
    let params = kernels::CopyRowsParams { rows: rows as u32, width: width as u32, x_pitch, y_pitch };
    Ok(kernels::copy_rows(gpu, y.dtype(), Grid::line(rows, 256), &sum, y, params)?)
}

/// Copies `x` into `y`, rounding to its dtype.
pub(crate) fn convert_into(x: &Tensor, y: &Tensor) -> Result<()> {
    same_shape("convert", y, x)?;
    let x = if x.dtype() == DType::F64 { x.to_dtype(DType::F32)? } else { x.contiguous()? };
    match place(y, OP)? {
        Place::Cpu => {
            let view = View::of_tensor(&x, "convert")?;
            for_dtype!("convert", y.dtype(), Y => for_dtype!("convert", x.dtype(), X => {
                let x = view.slice::<X>()?;
                with_slice_mut::<Y, _>(y, "convert", |y| pmetal_cpu::convert(x, y))
            }))
        }
        Place::Gpu(gpu) => convert_on_gpu(&*gpu, &x, y),
        Place::Reference => Ok(y.slice_set(&x.to_dtype(y.dtype())?, 0, 0)?),
    }
}

fn convert_on_gpu(gpu: &dyn Gpu, x: &Tensor, y: &Tensor) -> Result<()> {
    let (n, quads, grid) = span(&[x, y]);
    let done = match (x.dtype(), y.dtype()) {
        (from, to) if from == to => kernels::copy(gpu, to, grid, x, y, kernels::ElementwiseParams { n, quads }),
        (from, DType::F32) => kernels::to_f32(gpu, from, grid, x, y, kernels::ElementwiseParams { n, quads }),
        (DType::F32, to) => kernels::from_f32(gpu, to, grid, x, y, kernels::ElementwiseParams { n, quads }),
        _ => return convert_on_gpu(gpu, &converted(x, DType::F32)?, y),
    };
    Ok(done?)
}

/// `x` in `dtype`; itself where it has it.
pub(crate) fn converted(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    let y = empty(x.shape(), dtype, x.device())?;
    convert_into(x, &y)?;
    Ok(y)
}

/// `y += bias` for every row, in place: `y [rows, n]` contiguous, or on a GPU rows with a pitch; `bias [n]` of its dtype.
pub(crate) fn bias_add(y: &Tensor, bias: &Tensor) -> Result<()> {
    let (rows, n) = matrix("bias_add", y, "bias", bias)?;
    let bias = bias.contiguous()?;
    match place(y, OP)? {
        Place::Cpu => {
            let view = View::of_tensor(&bias, "bias_add")?;
            for_dtype!("bias_add", y.dtype(), T => {
                let bias = view.slice::<T>()?;
                with_slice_mut::<T, _>(y, "bias_add", |y| pmetal_cpu::bias_add(y, bias, n))
            })
        }
        Place::Gpu(gpu) => {
            let rows_per_group = rows.div_ceil(65_535).max(8);
            let (quads, threads) = (n.div_ceil(4), n.div_ceil(4).next_multiple_of(32).clamp(32, 256));
            let grid = Grid { groups: [quads.div_ceil(threads), rows.div_ceil(rows_per_group), 1], threads };
            let (rows_per_group, aligned) = (rows_per_group as u32, rows_in_quads(n, &[y, &bias]));
            let pitch = pitch_of(y);
            let params = kernels::BiasParams { rows: rows as u32, n: n as u32, rows_per_group, aligned, pitch };
            Ok(kernels::bias_add(&*gpu, y.dtype(), grid, &bias, y, params)?)
        }
        Place::Reference => Ok(y.slice_set(&y.broadcast_add(&bias)?, 0, 0)?),
    }
}

/// The gradient of [`bias_add`]: `dbias [n]` (f32) grows by the sum of the rows of `dy [rows, n]`.
pub(crate) fn bias_grad(dy: &Tensor, dbias: &Tensor) -> Result<()> {
    let (rows, n) = matrix("bias_grad", dy, "gradient of the bias", dbias)?;
    match place(dy, OP)? {
        Place::Cpu => {
            let dy = dy.contiguous()?;
            let view = View::of_tensor(&dy, "bias_grad")?;
            for_dtype!("bias_grad", dy.dtype(), T => {
                let dy = view.slice::<T>()?;
                with_slice_mut::<f32, _>(dbias, "bias_grad", |dbias| pmetal_cpu::bias_grad(dy, n, dbias))
            })
        }
        Place::Gpu(gpu) => {
            let (dy, (rows_per_group, groups)) = (readable(dy)?, row_groups(rows));
            let partial = empty((groups, n), DType::F32, dy.device())?;
            let (aligned, pitch) = (rows_in_quads(n, &[&dy]), pitch_of(&dy));
            let params = kernels::BiasParams { rows: rows as u32, n: n as u32, rows_per_group, aligned, pitch };
            kernels::bias_grad(&*gpu, dy.dtype(), column_grid(n, groups), &dy, &partial, params)?;
            column_sums(&*gpu, &partial, dbias, true)
        }
        Place::Reference => add_assign(dbias, &dy.sum(0)?),
    }
}

/// The columns of `partial [rows, n]` (f32), summed into `out [n]` (f32): added, or written over what is there.
pub(crate) fn column_sums(gpu: &dyn Gpu, partial: &Tensor, out: &Tensor, accumulate: bool) -> Result<()> {
    let (rows, n) = partial.dims2()?;
    let accumulate = u32::from(accumulate);
    let params = kernels::ColumnSumsParams { rows: rows as u32, n: n as u32, accumulate };
    Ok(kernels::column_sums(gpu, DType::F32, Grid::line(n.div_ceil(32), 256), partial, out, params)?)
}

/// How kernels that sum columns share rows out: rows of a threadgroup, and how many such groups there are (one where there is no row).
pub(crate) fn row_groups(rows: usize) -> (u32, usize) {
    let each = rows.div_ceil(512).max(128);
    (each as u32, rows.div_ceil(each).max(1))
}

/// Threadgroups of kernels that sum columns: 128 columns to each.
pub(crate) fn column_grid(n: usize, row_groups: usize) -> Grid {
    Grid { groups: [n.div_ceil(128), row_groups, 1], threads: 256 }
}

/// `x * keep / (1 - rate)`, where element `i` is kept if number `i` of the stream `seed` is at least `rate`, which is in `[0, 1)`. The same
/// call on the gradient is the backward.
pub(crate) fn dropout(x: &Tensor, seed: u64, rate: f32) -> Result<Tensor> {
    if !(0.0..1.0).contains(&rate) {
        return Err(Error::operand("dropout", "rate", "in [0, 1)", rate));
    }
    let x = x.contiguous()?;
    match place(&x, OP)? {
        Place::Cpu => {
            let view = View::of_tensor(&x, "dropout")?;
            for_dtype!("dropout", x.dtype(), T => {
                let mut y = room::<T>(x.elem_count());
                pmetal_cpu::dropout(view.slice::<T>()?, &mut y, seed, rate);
                tensor(y, x.shape().clone())
            })
        }
        Place::Gpu(gpu) => {
            let y = empty(x.shape(), x.dtype(), x.device())?;
            let (n, quads, grid) = span(&[&x, &y]);
            let params = kernels::DropoutParams { n, quads, seed, rate, factor: 1.0 / (1.0 - rate) };
            kernels::dropout(&*gpu, x.dtype(), grid, &x, &y, params)?;
            Ok(y)
        }
        Place::Reference => {
            let mut mask = vec![0f32; x.elem_count()];
            pmetal_cpu::dropout(&vec![1f32; mask.len()], &mut mask, seed, rate);
            Ok((&x * upload(&mask, x.device())?.reshape(x.shape())?.to_dtype(x.dtype())?)?)
        }
    }
}

/// What kernels over all elements of these tensors are told: how many there are, how many groups of four are moved whole, and the grid.
pub(crate) fn span(tensors: &[&Tensor]) -> (u64, u64, Grid) {
    let n = tensors.first().map_or(0, |t| t.elem_count());
    let quads = if in_quads(tensors) { n / 4 } else { 0 };
    (n as u64, quads as u64, Grid::cover(if quads > 0 { quads } else { n }, QUADS_PER_THREAD))
}

/// Enough for several loads in flight.
const QUADS_PER_THREAD: usize = 2;

/// 1 where four elements can be moved at once in every row of `width`, else 0.
pub(crate) fn rows_in_quads(width: usize, tensors: &[&Tensor]) -> u32 {
    u32::from(width.is_multiple_of(4) && in_quads(tensors))
}

fn in_quads(tensors: &[&Tensor]) -> bool {
    begin_at_multiples(4, tensors)
}

/// 1 where eight elements can be moved at once in every row of these tensors, else 0.
pub(crate) fn in_octets(tensors: &[&Tensor]) -> u32 {
    let whole = |t: &&Tensor| t.dims().last().is_some_and(|width| width.is_multiple_of(8));
    u32::from(tensors.iter().all(whole) && begin_at_multiples(8, tensors))
}

/// Allocations are aligned; a view may begin anywhere, and so may rows with a pitch.
fn begin_at_multiples(of: usize, tensors: &[&Tensor]) -> bool {
    let begins = |t: &&Tensor| t.layout().start_offset().is_multiple_of(of);
    tensors.iter().all(|t| begins(t) && (t.is_contiguous() || pitch(t).is_some_and(|pitch| pitch.is_multiple_of(of))))
}

/// What kernels of rows are told of a tensor that [`readable`] returned: how far its rows lie apart.
pub(crate) fn pitch_of(x: &Tensor) -> u32 {
    pitch(x).unwrap_or_default() as u32
}

/// A tensor as kernels of rows read it: contiguous, or rows with a pitch.
pub(crate) fn readable(x: &Tensor) -> Result<Tensor> {
    if pitch(x).is_some() { Ok(x.clone()) } else { Ok(x.contiguous()?) }
}

fn matrix(op: &'static str, x: &Tensor, what: &str, row: &Tensor) -> Result<(usize, usize)> {
    let (rows, n) = x.dims2()?;
    if row.dims() == [n] { Ok((rows, n)) } else { Err(Error::operand(op, what, [n], row.dims())) }
}

fn same_shape(op: &'static str, y: &Tensor, x: &Tensor) -> Result<()> {
    if y.shape() == x.shape() { Ok(()) } else { Err(Error::operand(op, "right operand", y.dims(), x.dims())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, emulated, random};

    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

    /// Numbers of `dtype`, with and without an aligned beginning.
    fn inputs(n: usize, seed: u64, dtype: DType) -> [Tensor; 2] {
        let long = random(&[n + 1], seed).to_dtype(dtype).unwrap();
        [long.narrow(0, 0, n).unwrap(), long.narrow(0, 1, n).unwrap()]
    }

    #[test]
    fn sums_and_conversions_of_every_pair_of_dtypes_on_a_gpu() {
        for (from, to) in DTYPES.iter().flat_map(|from| DTYPES.map(|to| (*from, to))) {
            for (n, x) in [1, 3, 17, 1030, 4099].iter().flat_map(|&n| inputs(n, 1, from).map(|x| (n, x))) {
                for f in [add_assign as fn(&Tensor, &Tensor) -> Result<()>, |y, x| convert_into(x, y)] {
                    let ys = [0, 1].map(|_| random(&[n], 2).to_dtype(to).unwrap());
                    f(&ys[0], &x).unwrap();
                    emulated(|| f(&ys[1], &x).unwrap());
                    assert_close(&ys[0], &ys[1], 0.0, &format!("{n} of {from:?} into {to:?}"));
                }
            }
        }
    }

    #[test]
    fn biases_and_their_gradients_on_a_gpu() {
        for (rows, n, dtype) in [1, 3, 70, 600].iter().flat_map(|&r| [1, 17, 24, 130].map(|n| (r, n, DType::BF16))) {
            let what = format!("{rows} rows of {n}");
            let bias = random(&[n], 1).to_dtype(dtype).unwrap();
            let ys = [0, 1].map(|_| random(&[rows, n], 2).to_dtype(dtype).unwrap());
            let grads = [0, 1].map(|_| random(&[n], 3).to_dtype(DType::F32).unwrap());
            bias_add(&ys[0], &bias).unwrap();
            bias_grad(&ys[0], &grads[0]).unwrap();
            emulated(|| {
                bias_add(&ys[1], &bias).unwrap();
                bias_grad(&ys[1], &grads[1]).unwrap();
            });
            assert_close(&ys[0], &ys[1], 0.0, &what);
            assert_close(&grads[0], &grads[1], 2e-5, &what);
        }
    }

    #[test]
    fn columns_of_a_wider_matrix_on_a_gpu() {
        for (rows, n, dtype) in [1, 3, 70].iter().flat_map(|&rows| [1, 17, 24].map(|n| (rows, n, DType::BF16))) {
            let what = format!("{rows} rows of {n}");
            let wide = |seed| random(&[rows, n + 16], seed).to_dtype(dtype).unwrap();
            let (bias, x) = (random(&[n], 1).to_dtype(dtype).unwrap(), wide(2).narrow(1, 8, n).unwrap());
            let wholes = [3, 3].map(wide);
            let [mut want, got] = wholes.each_ref().map(|whole| whole.narrow(1, 8, n).unwrap());
            let grads = [0, 1].map(|_| random(&[n], 4).to_dtype(DType::F32).unwrap());
            want = want.contiguous().unwrap();
            bias_add(&want, &bias).unwrap();
            add_assign(&want, &x).unwrap();
            bias_grad(&want, &grads[0]).unwrap();
            emulated(|| {
                bias_add(&got, &bias).unwrap();
                add_assign(&got, &x).unwrap();
                bias_grad(&got, &grads[1]).unwrap();
            });
            assert_close(&want, &got.contiguous().unwrap(), 0.0, &what);
            assert_close(&grads[0], &grads[1], 2e-5, &what);
            for first in [0, n + 8] {
                let [before, after] = wholes.each_ref().map(|whole| whole.narrow(1, first, 8).unwrap());
                let untouched = wide(3).narrow(1, first, 8).unwrap().contiguous().unwrap();
                assert_close(&untouched, &after.contiguous().unwrap(), 0.0, &what);
                assert_close(&untouched, &before.contiguous().unwrap(), 0.0, &what);
            }
        }
    }

    #[test]
    fn dropout_is_the_same_everywhere() {
        for (n, dtype) in [1, 17, 1030].iter().flat_map(|&n| DTYPES.map(|dtype| (n, dtype))) {
            for x in inputs(n, 5, dtype) {
                let want = dropout(&x, 1 << 40 | 77, 0.3).unwrap();
                let got = emulated(|| dropout(&x, 1 << 40 | 77, 0.3).unwrap());
                assert_close(&want, &got, 0.0, &format!("{n} of {dtype:?}"));
            }
        }
    }
}
