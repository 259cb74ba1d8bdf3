//! Every member by products of its own: groups with a weight that is trained.

use candle_core::Tensor;
use pmetal_metal::{Gpu, empty};

use super::{add_dropped, dropped, product, weight_gradient};
use crate::{
    Error, Result, Weight,
    autograd::{keep, unread},
    elementwise,
    linear::{Adapter, LinearGroup, LinearMember, OP, kernel::mask_seed},
};

/// Each member's result, and its low-rank half-product `scale * dropout(x) Aᵀ [tokens, r]`.
pub(in crate::linear) fn forward(
    gpu: &dyn Gpu,
    group: &LinearGroup,
    x: &Tensor,
    noise: Option<u64>,
) -> Result<Vec<(Tensor, Option<Tensor>)>> {
    group.members.iter().map(|member| member_forward(gpu, member, x, noise)).collect()
}

fn member_forward(
    gpu: &dyn Gpu,
    member: &LinearMember,
    x: &Tensor,
    noise: Option<u64>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (tokens, out, dtype) = (x.dim(0)?, member.out_features(), x.dtype());
    let half = |adapter: &Adapter| {
        let a = adapter.a.tensor_in(dtype)?;
        let u = empty((tokens, a.dim(0)?), dtype, x.device())?;
        product(gpu, &dropped(adapter, x, noise)?, &a, true, &u, adapter.scale, 0.0)?;
        Ok::<_, Error>(u)
    };
    let low_rank = member.adapter.as_ref().map(half).transpose()?;
    let compute = || {
        member.count(tokens, dtype);
        let y = empty((tokens, out), dtype, x.device())?;
        product(gpu, x, &member.weight.tensor_in(dtype)?, true, &y, 1.0, 0.0)?;
        if let Some((adapter, u)) = member.adapter.as_ref().zip(low_rank.as_ref()) {
            product(gpu, u, &adapter.b.tensor_in(dtype)?, true, &y, 1.0, 1.0)?;
        }
        if let Some(bias) = &member.bias {
            elementwise::bias_add(&y, &bias.tensor_in(dtype)?)?;
        }
        Ok(vec![y])
    };
    let y = match unread((tokens, out), dtype, x.device())? {
        Some(y) => y,
        None => keep(OP, compute)?.swap_remove(0),
    };
    Ok((y, low_rank))
}

/// Adds the gradients of every trained weight to the arena; returns that of the input where it is needed.
pub(in crate::linear) fn backward(
    gpu: &dyn Gpu,
    group: &LinearGroup,
    x: &Tensor,
    grads: Vec<Option<Tensor>>,
    low_ranks: &[Option<Tensor>],
    noise: Option<u64>,
    needs_dx: bool,
) -> Result<Option<Tensor>> {
    let mut dx = Dx { sum: needs_dx.then(|| empty(x.shape(), x.dtype(), x.device())).transpose()?, fresh: true };
    for ((member, dy), low_rank) in group.members.iter().zip(grads).zip(low_ranks) {
        let Some(dy) = dy else { continue };
        member_backward(gpu, member, x, &dy.contiguous()?, low_rank.as_ref(), noise, &mut dx)?;
    }
    dx.finish()
}

/// The input's gradient, summed over the members.
struct Dx {
    sum: Option<Tensor>,
    fresh: bool,
}

impl Dx {
    /// `sum += dy · weight`.
    fn add(&mut self, gpu: &dyn Gpu, dy: &Tensor, weight: &Tensor) -> Result<()> {
        let Some(sum) = &self.sum else { return Ok(()) };
        let beta = if self.fresh { 0.0 } else { 1.0 };
        self.fresh = false;
        product(gpu, dy, weight, false, sum, 1.0, beta)
    }

    fn finish(self) -> Result<Option<Tensor>> {
        match self.sum {
            Some(sum) if self.fresh => Ok(Some(sum.zeros_like()?)),
            sum => Ok(sum),
        }
    }
}

fn member_backward(
    gpu: &dyn Gpu,
    member: &LinearMember,
    x: &Tensor,
    dy: &Tensor,
    low_rank: Option<&Tensor>,
    noise: Option<u64>,
    dx: &mut Dx,
) -> Result<()> {
    let dtype = x.dtype();
    if dx.sum.is_some() {
        dx.add(gpu, dy, &member.weight.tensor_in(dtype)?)?;
    }
    if let Some(param) = member.weight.param() {
        weight_gradient(gpu, param, dy, x)?;
    }
    if let Some(param) = member.bias.as_ref().and_then(Weight::param) {
        elementwise::bias_grad(dy, param.grad_sum()?)?;
    }
    let (Some(adapter), Some(u)) = (&member.adapter, low_rank) else { return Ok(()) };
    if let Some(param) = adapter.b.param() {
        weight_gradient(gpu, param, dy, u)?;
    }
    let du = empty(u.shape(), dtype, u.device())?;
    product(gpu, dy, &adapter.b.tensor_in(dtype)?, false, &du, adapter.scale, 0.0)?;
    if let Some(param) = adapter.a.param() {
        weight_gradient(gpu, param, &du, &dropped(adapter, x, noise)?)?;
    }
    let Some(sum) = &dx.sum else { return Ok(()) };
    let a = adapter.a.tensor_in(dtype)?;
    match mask_seed(adapter, noise) {
        None => dx.add(gpu, &du, &a),
        Some(seed) => add_dropped(gpu, sum, &du, &a, seed, adapter.dropout),
    }
}
