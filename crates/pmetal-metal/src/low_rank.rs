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
    /// The members' gradients of `A` as the one tensor that they are, `[sum of ranks, K]`: where they lie below one another, all are written or
    /// all added to, and no member's ranks are padded but the last's.
    pub joined_da: Option<LowRankGradient<'a>>,
}

/// Fills the columns of `u [tokens, R]` that are the members' with `scale * x · aᵀ`, for `x [tokens, K]` and `a [R, K]`, whose rows may have a
/// pitch: a product for all members of one factor.
///
/// # Errors
/// Where the operands do not fit one another.
pub fn low_rank_forward<G: Gpu + ?Sized>(
    gpu: &G,
    x: &Tensor,
    a: &Tensor,
    u: &Tensor,
    members: &[LowRankMember],
) -> Result<()> {
    joined(members).try_for_each(|(_, ranks, alpha)| {
        let (a, u) = (&rows(a, &ranks)?, &columns(u, &ranks)?);
        gpu.gemm(&Gemm { a: x, a_transposed: false, b: a, b_transposed: true, c: u, alpha, beta: 0.0 })
    })
}

/// What [`Gpu::low_rank_backward`] makes of `dy`, `du` and the gradients of `B`: a product for `du` of all members of one factor, and one for
/// each gradient.
///
/// # Errors
/// As for [`low_rank_forward`].
pub fn low_rank_outputs<G: Gpu + ?Sized>(gpu: &G, work: &LowRankBackward) -> Result<()> {
    joined(work.members).try_for_each(|(outputs, ranks, alpha)| {
        let (dy, du) = (&columns(work.dy, &outputs)?, &columns(work.du, &ranks)?);
        let b = &columns(&rows(work.b, &outputs)?, &ranks)?;
        gpu.gemm(&Gemm { a: dy, a_transposed: false, b, b_transposed: false, c: du, alpha, beta: 0.0 })
    })?;
    work.members.iter().try_for_each(|member| {
        let Some((db, fresh)) = member.db else { return Ok(()) };
        let u = &columns(work.u, &(member.ranks.start..member.ranks.start + db.dim(1)?))?;
        gradient(gpu, &columns(work.dy, &member.outputs)?, u, db, fresh)
    })
}

/// What [`Gpu::low_rank_backward`] makes of `x`, the gradients of `A`: one product where they are one tensor, else one for each.
///
/// # Errors
/// As for [`low_rank_forward`].
pub fn low_rank_inputs<G: Gpu + ?Sized>(gpu: &G, work: &LowRankBackward) -> Result<()> {
    let of = |da: Option<LowRankGradient>, first: usize| {
        let Some((da, fresh)) = da else { return Ok(()) };
        gradient(gpu, &columns(work.du, &(first..first + da.dim(0)?))?, work.x, da, fresh)
    };
    match (work.joined_da, work.members.first()) {
        (Some(da), Some(first)) => of(Some(da), first.ranks.start),
        _ => work.members.iter().try_for_each(|member| of(member.da, member.ranks.start)),
    }
}

/// Outputs, ranks and factor of members that one product computes: those next to one another that have the same factor. Between them `b` is
/// zeros.
fn joined<'a>(members: &'a [LowRankMember]) -> impl Iterator<Item = (Range<usize>, Range<usize>, f32)> + 'a {
    let next = |a: &LowRankMember, b: &LowRankMember| {
        a.scale == b.scale && a.ranks.end == b.ranks.start && a.outputs.end == b.outputs.start
    };
    members.chunk_by(next).filter_map(|chunk| {
        let (first, last) = (chunk.first()?, chunk.last()?);
        Some((first.outputs.start..last.outputs.end, first.ranks.start..last.ranks.end, first.scale))
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
