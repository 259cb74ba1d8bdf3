//! The group on the CPU: the input is packed once for all members; adapters ride along as further terms of the sums.
//!
//! bf16 inputs are multiplied as bf16 where the machine has instructions for it: adapters, kept in f32, are rounded to it for the products, as the
//! gradients that come in are. Sums are f32, and so are the gradients of parameters.

use candle_core::{Device, Tensor};
use pmetal_cpu::{Arithmetic, FewRows, Left, MAX_ROWS, Mat, Right, few_rows, matmul, multiply};

use super::{Adapter, LinearGroup, LinearMember, OP};
use crate::{
    Param, Result, Weight,
    autograd::{keep, unread},
    kernel::{CpuElement, View, for_dtype, room, tensor},
};

/// `scale * dropout(x) Aᵀ`, `[tokens, r]`: what the gradient of B needs.
pub(super) type LowRank = Option<Vec<f32>>;

/// Each member's result, and its low-rank half-product.
pub(super) fn forward(group: &LinearGroup, x: &Tensor, noise: Option<u64>) -> Result<Vec<(Tensor, LowRank)>> {
    let (tokens, width) = x.dims2()?;
    let xv = View::of_tensor(x, OP)?;
    for_dtype!(OP, x.dtype(), T => {
        let x = Input { data: xv.slice::<T>()?, tokens, width };
        if tokens <= MAX_ROWS {
            return few_rows_forward(group, &x, noise);
        }
        let left = x.left();
        group.members.iter().map(|member| member_forward(member, &x, &left, noise)).collect()
    })
}

/// [`forward`] where weights stream past a few rows: all members in one go.
fn few_rows_forward<T: CpuElement>(
    group: &LinearGroup,
    x: &Input<T>,
    noise: Option<u64>,
) -> Result<Vec<(Tensor, LowRank)>> {
    let halves = group.members.iter().map(|member| few_rows_half(member, x, noise)).collect::<Result<Vec<_>>>()?;
    let weights = group.members.iter().map(|member| member.weight.view()).collect::<Result<Vec<_>>>()?;
    let factors = group.members.iter().map(|member| member.adapter.as_ref().map(|a| a.b.view()).transpose());
    let factors = factors.collect::<Result<Vec<_>>>()?;
    let mut results: Vec<_> = group.members.iter().map(|m| room::<T>(x.tokens * m.out_features())).collect();
    let mut products = Vec::with_capacity(results.len());
    for (i, (member, c)) in group.members.iter().zip(&mut results).enumerate() {
        let out = member.out_features();
        let low_rank = match (&halves[i], &factors[i]) {
            (Some(u), Some(b)) => Some((u.as_slice(), b.right(out, member.rank(), true)?)),
            _ => None,
        };
        products.push(FewRows { c, c_row_stride: out, right: weights[i].right(out, x.width, true)?, low_rank });
    }
    few_rows(x.mat(), &mut products, 1.0, 0.0);
    group.members.iter().for_each(|member| member.count(x.tokens, T::DTYPE));
    let finish = |((member, mut y), half): ((&LinearMember, Vec<T>), LowRank)| {
        let out = member.out_features();
        add_bias(member, &mut y)?;
        Ok((tensor(y, (x.tokens, out))?, half))
    };
    group.members.iter().zip(results).zip(halves).map(finish).collect()
}

fn few_rows_half<T: CpuElement>(member: &LinearMember, x: &Input<T>, noise: Option<u64>) -> Result<LowRank> {
    let Some(adapter) = &member.adapter else { return Ok(None) };
    let dropped = dropped(adapter, x.data, noise);
    let seen = Mat::new(dropped.as_deref().unwrap_or(x.data), x.tokens, x.width);
    let r = member.rank();
    let mut u = room::<f32>(x.tokens * r);
    let a = adapter.a.view()?;
    let product = FewRows { c: &mut u, c_row_stride: r, right: a.right(r, x.width, true)?, low_rank: None };
    few_rows(seen, &mut [product], adapter.scale, 0.0);
    Ok(Some(u))
}

fn add_bias<T: CpuElement>(member: &LinearMember, y: &mut [T]) -> Result<()> {
    let Some(bias) = &member.bias else { return Ok(()) };
    let view = bias.view()?;
    for_dtype!(OP, view.dtype(), B => {
        pmetal_cpu::bias_add(y, view.slice::<B>()?, member.out_features());
        Ok(())
    })
}

/// The input of a group.
struct Input<'a, T> {
    /// `[tokens, width]`.
    data: &'a [T],
    tokens: usize,
    width: usize,
}

impl<T: CpuElement> Input<'_, T> {
    fn mat(&self) -> Mat<'_, T> {
        Mat::new(self.data, self.tokens, self.width)
    }

    fn left(&self) -> Left {
        Left::new(self.mat(), Arithmetic::of::<T>())
    }
}

fn member_forward<T: CpuElement>(
    member: &LinearMember,
    x: &Input<T>,
    left: &Left,
    noise: Option<u64>,
) -> Result<(Tensor, LowRank)> {
    let low_rank = member.adapter.as_ref().map(|adapter| half_product(adapter, x, left, noise)).transpose()?;
    let y = match unread((x.tokens, member.out_features()), T::DTYPE, &Device::Cpu)? {
        Some(y) => y,
        None => keep(OP, || Ok(vec![member_product(member, x, left, low_rank.as_deref())?]))?.swap_remove(0),
    };
    Ok((y, low_rank))
}

/// The products of a member's weight and of its adapter's second half, and its bias.
fn member_product<T: CpuElement>(
    member: &LinearMember,
    x: &Input<T>,
    left: &Left,
    low_rank: Option<&[f32]>,
) -> Result<Tensor> {
    let (tokens, out) = (x.tokens, member.out_features());
    member.count(tokens, T::DTYPE);
    let mut y = room::<T>(tokens * out);
    let weight = member.weight.view()?;
    let weight = weight.right(out, x.width, true)?;
    match (&member.adapter, low_rank) {
        (Some(adapter), Some(u)) => {
            let r = adapter.rank();
            let b = adapter.b.view()?;
            let half = Left::new(Mat::new(u, tokens, r), Arithmetic::of::<T>());
            multiply(&mut y, out, &[(left, weight), (&half, b.right(out, r, true)?)], 1.0, 0.0);
        }
        _ => multiply(&mut y, out, &[(left, weight)], 1.0, 0.0),
    }
    add_bias(member, &mut y)?;
    tensor(y, (tokens, out))
}

fn half_product<T: CpuElement>(adapter: &Adapter, x: &Input<T>, left: &Left, noise: Option<u64>) -> Result<Vec<f32>> {
    let r = adapter.rank();
    let dropped = dropped(adapter, x.data, noise);
    let dropped = dropped.map(|data| Input { data: &data, ..*x }.left());
    let left = dropped.as_ref().unwrap_or(left);
    let mut u = room::<f32>(x.tokens * r);
    multiply(&mut u, r, &[(left, adapter.a.view()?.right(r, x.width, true)?)], adapter.scale, 0.0);
    Ok(u)
}

/// The input as the adapter saw it, where dropout is on.
fn dropped<T: CpuElement>(adapter: &Adapter, x: &[T], noise: Option<u64>) -> Option<Vec<T>> {
    let seed = mask_seed(adapter, noise)?;
    let mut y = room::<T>(x.len());
    pmetal_cpu::dropout(x, &mut y, seed, adapter.dropout);
    Some(y)
}

/// The seed of this adapter's dropout mask; none where there is no dropout.
pub(super) fn mask_seed(adapter: &Adapter, noise: Option<u64>) -> Option<u64> {
    let noise = noise.filter(|_| adapter.dropout > 0.0)?;
    Some(pmetal_cpu::mix(noise, &[adapter.place]))
}

/// Adds the gradients of every trained weight to the arena; returns that of the input where it is needed.
pub(super) fn backward(
    group: &LinearGroup,
    x: &Tensor,
    grads: Vec<Option<Tensor>>,
    low_ranks: &[LowRank],
    noise: Option<u64>,
    needs_dx: bool,
) -> Result<Option<Tensor>> {
    let (tokens, width) = x.dims2()?;
    let xv = View::of_tensor(x, OP)?;
    for_dtype!(OP, x.dtype(), T => {
        let x = Input { data: xv.slice::<T>()?, tokens, width };
        let mut ways = Vec::with_capacity(group.members.len());
        for ((member, dy), low_rank) in group.members.iter().zip(grads).zip(low_ranks) {
            if let Some(dy) = dy {
                ways.push(Way::new(member, &x, &dy.contiguous()?, low_rank.as_deref(), noise)?);
            }
        }
        if !needs_dx {
            return Ok(None);
        }
        Ok(Some(tensor(input_gradient(&ways, &x, noise)?, (tokens, width))?))
    })
}

/// A member on the way back: its incoming gradient, and that of the low-rank half, ready to be multiplied.
struct Way<'a> {
    member: &'a LinearMember,
    dy: Left,
    du: Option<(&'a Adapter, Left)>,
}

impl<'a> Way<'a> {
    /// Packs the gradient and adds to those of the member's trained weights.
    fn new<T: CpuElement>(
        member: &'a LinearMember,
        x: &Input<T>,
        dy: &Tensor,
        low_rank: Option<&[f32]>,
        noise: Option<u64>,
    ) -> Result<Self> {
        let (tokens, out, arithmetic) = (x.tokens, member.out_features(), Arithmetic::of::<T>());
        let dyv = View::of_tensor(dy, OP)?;
        let grad = dyv.slice::<T>()?;
        let grad_mat = Mat::new(grad, tokens, out);
        let dy = Left::new(grad_mat, arithmetic);
        if let Some(param) = member.weight.param() {
            param.accumulate_grad(|g| matmul(g, x.width, grad_mat.t(), x.mat(), 1.0, 1.0))?;
        }
        if let Some(param) = member.bias.as_ref().and_then(Weight::param) {
            param.accumulate_grad(|g| pmetal_cpu::bias_grad(grad, out, g))?;
        }
        let (Some(adapter), Some(u)) = (&member.adapter, low_rank) else { return Ok(Self { member, dy, du: None }) };
        let r = adapter.rank();
        if let Some(param) = adapter.b.param() {
            gradient_of_b(param, Mat::new(u, tokens, r), grad_mat)?;
        }
        let mut du = room::<f32>(tokens * r);
        multiply(&mut du, r, &[(&dy, adapter.b.view()?.right(out, r, false)?)], adapter.scale, 0.0);
        let du_mat = Mat::new(&du, tokens, r);
        if let Some(param) = adapter.a.param() {
            let dropped = dropped(adapter, x.data, noise);
            let seen = Mat::new(dropped.as_deref().unwrap_or(x.data), tokens, x.width);
            let left = Left::new(du_mat.t(), arithmetic);
            param.accumulate_grad(|g| multiply(g, x.width, &[(&left, Right::plain(seen))], 1.0, 1.0))?;
        }
        let du = Left::new(du_mat, arithmetic);
        Ok(Self { member, dy, du: Some((adapter, du)) })
    }
}

/// Adds `dyᵀ u` to the gradient of `B [out, r]`. The product is formed the other way round, `[r, out]`: few rows are packed, and the many
/// columns are read where they lie.
fn gradient_of_b<T: CpuElement>(param: &Param, u: Mat<f32>, dy: Mat<T>) -> Result<()> {
    let (r, out) = (u.cols(), dy.cols());
    let mut turned = room::<f32>(r * out);
    let left = Left::new(u.t(), Arithmetic::of::<T>());
    multiply(&mut turned, out, &[(&left, Right::plain(dy))], 1.0, 0.0);
    param.accumulate_grad(|g| {
        for (i, row) in turned.chunks_exact(out).enumerate() {
            g.iter_mut().skip(i).step_by(r).zip(row).for_each(|(g, x)| *g += x);
        }
    })
}

/// The input's gradient, `sum of dy W + du A`, in one sum rounded once; what went through dropout is added behind its mask.
fn input_gradient<T: CpuElement>(ways: &[Way], x: &Input<T>, noise: Option<u64>) -> Result<Vec<T>> {
    let (tokens, width) = (x.tokens, x.width);
    let weights = ways.iter().map(|way| way.member.weight.view()).collect::<Result<Vec<_>>>()?;
    let halves: Vec<_> = ways.iter().filter_map(|way| way.du.as_ref()).collect();
    let (masked, plain): (Vec<_>, Vec<_>) =
        halves.into_iter().partition(|(adapter, _)| mask_seed(adapter, noise).is_some());
    let factors = plain.iter().map(|(adapter, _)| adapter.a.view()).collect::<Result<Vec<_>>>()?;
    let mut terms = Vec::with_capacity(weights.len() + factors.len());
    for (way, weight) in ways.iter().zip(&weights) {
        terms.push((&way.dy, weight.right(way.member.out_features(), width, false)?));
    }
    for ((adapter, du), a) in plain.iter().zip(&factors) {
        terms.push((du, a.right(adapter.rank(), width, false)?));
    }
    let mut dx = room::<T>(tokens * width);
    multiply(&mut dx, width, &terms, 1.0, 0.0);
    for (adapter, du) in masked {
        let Some(seed) = mask_seed(adapter, noise) else { continue };
        let mut through = room::<f32>(tokens * width);
        multiply(&mut through, width, &[(du, adapter.a.view()?.right(adapter.rank(), width, false)?)], 1.0, 0.0);
        let mut seen = room::<f32>(through.len());
        pmetal_cpu::dropout(&through, &mut seen, seed, adapter.dropout);
        pmetal_cpu::add_assign_mixed(&mut dx, &seen);
    }
    Ok(dx)
}
