//! The products of low-rank adapters with the rows that stream past them.

use std::ops::Range;

use candle_core::Tensor;

use crate::{Gemm, Gpu, Result};

/// A member of a linear group that has an adapter: which part of the group's matrices is its own.
///
/// The group's input is `x [tokens, K]`, its results are column ranges of `y [tokens, N]`, its adapters column ranges of `u [tokens, R]`;
/// `a [R, K]` and `b [N, R]` hold the adapters' matrices, `b` those of a member in its rows and columns and zeros elsewhere.
#[derive(Clone, Debug)]
pub struct LowRankMember<'a> {
    /// Its columns of `y`, which are its rows of `b`.
    pub outputs: Range<usize>,
    /// Its columns of `u`, which are its rows of `a` and its columns of `b`: its rank, or more, where what is beyond the rank holds zeros.
    pub ranks: Range<usize>,
    /// Factor of the adapter.
    pub scale: f32,
    /// The gradient of `A [r, K]`, none where it is not trained.
    pub da: Option<LowRankGradient<'a>>,
    /// The gradient of `B [outputs, r]`, none where it is not trained.
    pub db: Option<LowRankGradient<'a>>,
}

/// A gradient, f32 and contiguous, and whether it is written; else it is added to.
pub type LowRankGradient<'a> = (&'a Tensor, bool);

/// What the backward of a group's low-rank products reads and writes; rows may have a pitch, the gradients of parameters have none.
#[derive(Clone, Copy, Debug)]
pub struct LowRankBackward<'a> {
    /// `[tokens, N]`: the gradient of `y`.
    pub dy: &'a Tensor,
    /// `[N, R]`.
    pub b: &'a Tensor,
    /// `[tokens, K]`.
    pub x: &'a Tensor,
    /// `[tokens, R]`: what the forward filled.
    pub u: &'a Tensor,
    /// `[tokens, R]`: filled with `scale * dy · b` of each member.
    pub du: &'a Tensor,
    /// Whose products are asked for.
    pub members: &'a [LowRankMember<'a>],
}

/// [`Gpu::low_rank_forward`] as a product for each member.
pub(crate) fn forward<G: Gpu + ?Sized>(
    gpu: &G,
    x: &Tensor,
    a: &Tensor,
    u: &Tensor,
    members: &[LowRankMember],
) -> Result<()> {
    members.iter().try_for_each(|member| {
        let (a, u) = (&rows(a, &member.ranks)?, &columns(u, &member.ranks)?);
        gpu.gemm(&Gemm { a: x, a_transposed: false, b: a, b_transposed: true, c: u, alpha: member.scale, beta: 0.0 })
    })
}

/// [`Gpu::low_rank_backward`] as up to three products for each member.
pub(crate) fn backward<G: Gpu + ?Sized>(gpu: &G, work: &LowRankBackward) -> Result<()> {
    work.members.iter().try_for_each(|member| {
        let dy = &columns(work.dy, &member.outputs)?;
        let (u, du) = (&columns(work.u, &member.ranks)?, &columns(work.du, &member.ranks)?);
        let b = &columns(&rows(work.b, &member.outputs)?, &member.ranks)?;
        let alpha = member.scale;
        gpu.gemm(&Gemm { a: dy, a_transposed: false, b, b_transposed: false, c: du, alpha, beta: 0.0 })?;
        if let Some((db, fresh)) = member.db {
            gradient(gpu, dy, &columns(u, &(0..db.dim(1)?))?, db, fresh)?;
        }
        let Some((da, fresh)) = member.da else { return Ok(()) };
        gradient(gpu, &columns(du, &(0..da.dim(0)?))?, work.x, da, fresh)
    })
}

/// `c (+)= leftᵀ · right`.
fn gradient<G: Gpu + ?Sized>(gpu: &G, left: &Tensor, right: &Tensor, c: &Tensor, fresh: bool) -> Result<()> {
    let beta = if fresh { 0.0 } else { 1.0 };
    gpu.gemm(&Gemm { a: left, a_transposed: true, b: right, b_transposed: false, c, alpha: 1.0, beta })
}

fn rows(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.narrow(0, range.start, range.len())?)
}

fn columns(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.narrow(1, range.start, range.len())?)
}
