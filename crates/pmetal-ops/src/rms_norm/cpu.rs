//! RMSNorm by the kernels of the CPU.

use candle_core::Tensor;

use super::{OP, RmsNorm, Saved};
use crate::{
    Result,
    kernel::{View, for_dtype, room, tensor},
};

/// The norm of `x`, and `1 / sqrt(mean(x²) + eps)` of each row.
pub(super) fn forward(x: &Tensor, weight: &Tensor, norm: RmsNorm) -> Result<(Tensor, Tensor)> {
    let (RmsNorm { eps, rounds_first, .. }, width) = (norm, weight.elem_count());
    let (xv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = room(x.elem_count() / width);
    for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut y = room::<T>(x.elem_count());
        pmetal_cpu::rms_norm_forward(xv.slice::<T>()?, wv.slice::<W>()?, eps as f32, rounds_first, width, &mut y, &mut rstd);
        let rows = rstd.len();
        Ok((tensor(y, x.shape().clone())?, tensor(rstd, rows)?))
    }))
}

/// `x + residual`, and what [`forward`] makes of it.
pub(super) fn add_forward(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    norm: RmsNorm,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (RmsNorm { eps, rounds_first, .. }, width) = (norm, weight.elem_count());
    let (xv, rv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(residual, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = room(x.elem_count() / width);
    for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let (mut sum, mut y) = (room::<T>(x.elem_count()), room::<T>(x.elem_count()));
        let (xs, rs, ws) = (xv.slice::<T>()?, rv.slice::<T>()?, wv.slice::<W>()?);
        pmetal_cpu::add_rms_norm_forward(xs, rs, ws, eps as f32, rounds_first, width, &mut sum, &mut y, &mut rstd);
        let rows = rstd.len();
        Ok((tensor(sum, x.shape().clone())?, tensor(y, x.shape().clone())?, tensor(rstd, rows)?))
    }))
}

/// The gradients of what was normalised (plus `dsum`) and of the weight.
pub(super) fn backward(
    dy: &Tensor,
    Saved { x, weight, norm, rstd, .. }: &Saved,
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
            dyv.slice::<T>()?, xv.slice::<T>()?, wv.slice::<W>()?, rstdv.slice::<f32>()?, norm.rounds_first,
            width, dsum, &mut dx, dweight.as_deref_mut(),
        );
        tensor(dx, x.shape().clone())
    }))?;
    Ok((dx, dweight.map(|d| tensor(d, width)).transpose()?))
}
