//! Sums, conversions: what the walk back and the arenas need between operations.

use candle_core::Tensor;

use crate::{
    Error, Result,
    kernel::{View, for_dtype, has_cpu_kernel, with_slice_mut},
};

/// `y += x` in place; both contiguous, of one shape, float dtypes that may differ.
pub(crate) fn add_assign(y: &Tensor, x: &Tensor) -> Result<()> {
    same_shape("add_assign", y, x)?;
    if !has_cpu_kernel(y) {
        return in_place_by_candle(y, &(y + x.to_dtype(y.dtype())?)?);
    }
    let x = x.contiguous()?;
    let view = View::of_tensor(&x, "add_assign")?;
    for_dtype!("add_assign", y.dtype(), Y => for_dtype!("add_assign", x.dtype(), X => {
        let x = view.slice::<X>()?;
        with_slice_mut::<Y, _>(y, "add_assign", |y| pmetal_cpu::add_assign_mixed(y, x))
    }))
}

/// Copies `x` into `y`, rounding to its dtype.
pub(crate) fn convert_into(x: &Tensor, y: &Tensor) -> Result<()> {
    same_shape("convert", y, x)?;
    let x = if x.dtype() == candle_core::DType::F64 { x.to_dtype(candle_core::DType::F32)? } else { x.contiguous()? };
    let view = View::of_tensor(&x, "convert")?;
    for_dtype!("convert", y.dtype(), Y => for_dtype!("convert", x.dtype(), X => {
        let x = view.slice::<X>()?;
        with_slice_mut::<Y, _>(y, "convert", |y| pmetal_cpu::convert(x, y))
    }))
}

fn in_place_by_candle(y: &Tensor, sum: &Tensor) -> Result<()> {
    Ok(y.slice_set(sum, 0, 0)?)
}

fn same_shape(op: &'static str, y: &Tensor, x: &Tensor) -> Result<()> {
    if y.shape() == x.shape() { Ok(()) } else { Err(Error::operand(op, "right operand", y.dims(), x.dims())) }
}
