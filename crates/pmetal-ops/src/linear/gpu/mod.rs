//! The group on a GPU: operands and sums in the dtype of the input, f32 inside a product and in the gradients of parameters.
//!
//! Where all weights are frozen, weights and adapters are one matrix ([`Joint`]), else each member has products of its own ([`each`]).

pub(super) mod each;
mod joint;
mod placement;

use candle_core::Tensor;
use pmetal_metal::{Gemm, Gpu, empty};

use super::{Adapter, kernel::mask_seed};
use crate::{Param, Result, elementwise};

pub(super) use joint::{Joint, forward};
pub(crate) use placement::Placements;

/// `c = alpha * a · w (or its transpose) + beta * c`.
pub(crate) fn product(
    gpu: &dyn Gpu,
    a: &Tensor,
    w: &Tensor,
    transposed: bool,
    c: &Tensor,
    alpha: f32,
    beta: f32,
) -> Result<()> {
    Ok(gpu.gemm(&Gemm { a, a_transposed: false, b: w, b_transposed: transposed, c, alpha, beta })?)
}

/// Adds `rowsᵀ · columns` to a parameter's gradient.
pub(crate) fn weight_gradient(gpu: &dyn Gpu, param: &Param, rows: &Tensor, columns: &Tensor) -> Result<()> {
    let (c, fresh) = param.grad_target();
    let beta = if fresh { 0.0 } else { 1.0 };
    Ok(gpu.gemm(&Gemm { a: rows, a_transposed: true, b: columns, b_transposed: false, c, alpha: 1.0, beta })?)
}

/// The input as the adapter saw it.
fn dropped(adapter: &Adapter, x: &Tensor, noise: Option<u64>) -> Result<Tensor> {
    match mask_seed(adapter, noise) {
        Some(seed) => elementwise::dropout(x, seed, adapter.dropout),
        None => Ok(x.clone()),
    }
}

/// `dx += mask * (du · A)` for an input that went through dropout.
fn add_dropped(gpu: &dyn Gpu, dx: &Tensor, du: &Tensor, a: &Tensor, seed: u64, dropout: f32) -> Result<()> {
    let through = empty(dx.shape(), dx.dtype(), dx.device())?;
    product(gpu, du, a, false, &through, 1.0, 0.0)?;
    elementwise::add_assign(dx, &elementwise::dropout(&through, seed, dropout)?)
}
