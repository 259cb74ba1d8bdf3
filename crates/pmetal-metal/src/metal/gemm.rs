//! Matrix products by candle's kernels, which are MLX's: sums in f32, one rounding at the end to the dtype of the operands.

use candle_core::{DType, Storage, Tensor};
use candle_metal_kernels::{GemmDType, call_mlx_gemm};

use super::Metal;
use crate::{Gemm, Grid, Result, empty, kernels, pitch};

/// `c = alpha * op(a) · op(b) + beta * c`.
///
/// A product in the dtype of `c` goes straight where it belongs; with another factor than 1 and 0, or into the middle of a buffer, where
/// candle's kernel does not write, it passes through a buffer of its own: one more rounding where the dtype is short. Into an f32 `c`, as
/// gradients of parameters are, nothing is rounded on the way: short operands become f32 first, since candle's kernel writes what it
/// reads. That costs a copy of each, twice as large.
pub(super) fn gemm(metal: &Metal, product: &Gemm) -> Result<()> {
    let &Gemm { a, a_transposed, b, b_transposed, c, alpha, beta } = product;
    let [m, n, k] = product.sizes()?;
    if m * n == 0 {
        return Ok(());
    }
    let direct =
        alpha == 1.0 && beta == 0.0 && k > 0 && c.is_contiguous() && c.storage_and_layout().1.start_offset() == 0;
    let target = match (direct, k) {
        (true, _) => c.clone(),
        (false, 0) => Tensor::zeros((m, n), c.dtype(), c.device())?,
        (false, _) => empty((m, n), c.dtype(), c.device())?,
    };
    if k > 0 {
        let (a, b) = (a.to_dtype(c.dtype())?, b.to_dtype(c.dtype())?);
        let strides = |t: &Tensor, transposed: bool| -> Result<[usize; 2]> {
            let pitch = pitch(t).ok_or_else(|| metal.failed("a product of matrices without contiguous rows"))?;
            Ok(if transposed { [1, pitch] } else { [pitch, 1] })
        };
        let (a_strides, b_strides) = (strides(&a, a_transposed)?, strides(&b, b_transposed)?);
        multiply(metal, [&a, &b, &target], (m, n, k), a_strides, b_strides)?;
        metal.weigh(2.0 * m as f64 * n as f64 * k as f64)?;
    }
    if direct {
        return Ok(());
    }
    let elements = m as u64 * n as u64;
    let pitch = pitch(c).ok_or_else(|| metal.failed("a product into a matrix without contiguous rows"))?;
    let params = kernels::EpilogueParams { n: elements, width: n as u64, pitch: pitch as u64, alpha, beta };
    kernels::gemm_epilogue(metal, c.dtype(), Grid::cover(m * n, 4), &target, c, params)
}

/// `target = a · b`, all of one dtype, `target` from the start of its buffer.
fn multiply(
    metal: &Metal,
    [a, b, target]: [&Tensor; 3],
    (m, n, k): (usize, usize, usize),
    a_strides: [usize; 2],
    b_strides: [usize; 2],
) -> Result<()> {
    let dtype = match target.dtype() {
        DType::F32 => GemmDType::F32,
        DType::F16 => GemmDType::F16,
        DType::BF16 => GemmDType::BF16,
        other => return Err(metal.failed(format!("there are no products of {other:?}"))),
    };
    let ((a_storage, a_layout), (b_storage, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    let (target_storage, _) = target.storage_and_layout();
    let (Storage::Metal(a_storage), Storage::Metal(b_storage), Storage::Metal(target_storage)) =
        (&*a_storage, &*b_storage, &*target_storage)
    else {
        return Err(metal.failed("a product of tensors elsewhere"));
    };
    let size = target.dtype().size_in_bytes();
    let encoder = metal.device.command_encoder()?;
    call_mlx_gemm(
        metal.device.metal_device(),
        &encoder,
        metal.device.kernels(),
        dtype,
        (1, m, n, k),
        &a_strides,
        a_layout.start_offset() * size,
        a_storage.buffer(),
        &b_strides,
        b_layout.start_offset() * size,
        b_storage.buffer(),
        target_storage.buffer(),
    )
    .map_err(|e| metal.failed(e))
}
