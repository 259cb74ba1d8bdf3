//! The group on the CPU: f32 accumulation, weights widened tile by tile inside the product.

use candle_core::{DType, Tensor};
use pmetal_cpu::{Mat, matmul};

use super::{Adapter, LinearGroup, LinearMember, OP};
use crate::{
    Result, Weight,
    elementwise::convert_into,
    kernel::{CpuElement, View, for_dtype, room, tensor},
};

/// `scale * dropout(x) Aᵀ`, `[tokens, r]`: what the gradient of B needs.
pub(super) type LowRank = Option<Vec<f32>>;

/// One member's result, and its low-rank half-product.
pub(super) fn forward(member: &LinearMember, x: &Tensor, noise: Option<u64>) -> Result<(Tensor, LowRank)> {
    let (tokens, width) = x.dims2()?;
    let out = member.out_features();
    let xv = View::of_tensor(x, OP)?;
    for_dtype!(OP, x.dtype(), T => {
        let x = xv.slice::<T>()?;
        let mut y = room::<T>(tokens * out);
        product(&mut y, out, Mat::new(x, tokens, width), &member.weight, true, 1.0, 0.0)?;
        let mut low_rank = None;
        if let Some(adapter) = &member.adapter {
            let u = half_product(adapter, x, tokens, width, noise)?;
            let r = u.len() / tokens.max(1);
            product(&mut y, out, Mat::new(&u, tokens, r), &adapter.b, true, 1.0, 1.0)?;
            low_rank = Some(u);
        }
        if let Some(bias) = &member.bias {
            let view = bias.view()?;
            for_dtype!(OP, view.dtype(), B => {
                pmetal_cpu::bias_add(&mut y, view.slice::<B>()?, out);
                Ok(())
            })?;
        }
        Ok((tensor(y, (tokens, out))?, low_rank))
    })
}

fn half_product<T: CpuElement>(
    adapter: &Adapter,
    x: &[T],
    tokens: usize,
    width: usize,
    noise: Option<u64>,
) -> Result<Vec<f32>> {
    let dropped = dropped(adapter, x, noise);
    let x = dropped.as_deref().unwrap_or(x);
    let r = adapter.a.shape().dims()[0];
    let mut u = vec![0f32; tokens * r];
    product(&mut u, r, Mat::new(x, tokens, width), &adapter.a, true, adapter.scale, 0.0)?;
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

/// `c = alpha * a · W (or Wᵀ) + beta * c` for a weight of any dtype.
fn product<A: CpuElement, C: CpuElement>(
    c: &mut [C],
    c_row_stride: usize,
    a: Mat<A>,
    weight: &Weight,
    transposed: bool,
    alpha: f32,
    beta: f32,
) -> Result<()> {
    let (rows, cols) = weight.shape().dims2()?;
    let view = weight.view()?;
    for_dtype!(OP, view.dtype(), W => {
        let w = Mat::new(view.slice::<W>()?, rows, cols);
        matmul(c, c_row_stride, a, if transposed { w.t() } else { w }, alpha, beta);
        Ok(())
    })
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
    let mut dx = needs_dx.then(|| Dx { sum: vec![0f32; tokens * width], tokens, width, fresh: true });
    let xv = View::of_tensor(x, OP)?;
    for_dtype!(OP, x.dtype(), T => {
        let x = xv.slice::<T>()?;
        for ((member, dy), low_rank) in group.members.iter().zip(grads).zip(low_ranks) {
            let Some(dy) = dy else { continue };
            let dy = dy.contiguous()?;
            let dyv = View::of_tensor(&dy, OP)?;
            member_backward(member, x, dyv.slice::<T>()?, low_rank, noise, tokens, dx.as_mut())?;
        }
        Ok(())
    })?;
    let Some(dx) = dx else { return Ok(None) };
    let wide = tensor(dx.sum, (tokens, width))?;
    if x.dtype() == DType::F32 {
        return Ok(Some(wide));
    }
    let rounded = Tensor::zeros((tokens, width), x.dtype(), x.device())?;
    convert_into(&wide, &rounded)?;
    Ok(Some(rounded))
}

/// The input's gradient, summed over the members in f32 and rounded once.
struct Dx {
    sum: Vec<f32>,
    tokens: usize,
    width: usize,
    fresh: bool,
}

impl Dx {
    /// `sum += dy · weight`.
    fn add<A: CpuElement>(&mut self, dy: Mat<A>, weight: &Weight) -> Result<()> {
        let beta = if self.fresh { 0.0 } else { 1.0 };
        self.fresh = false;
        product(&mut self.sum, self.width, dy, weight, false, 1.0, beta)
    }

    /// `sum += mask * (du · A)` for an input that went through dropout.
    fn add_dropped(&mut self, du: Mat<f32>, adapter: &Adapter, seed: u64) -> Result<()> {
        let mut through = vec![0f32; self.tokens * self.width];
        product(&mut through, self.width, du, &adapter.a, false, 1.0, 0.0)?;
        let mut masked = vec![0f32; through.len()];
        pmetal_cpu::dropout(&through, &mut masked, seed, adapter.dropout);
        pmetal_cpu::add_assign(&mut self.sum, &masked);
        self.fresh = false;
        Ok(())
    }
}

fn member_backward<T: CpuElement>(
    member: &LinearMember,
    x: &[T],
    dy: &[T],
    low_rank: &LowRank,
    noise: Option<u64>,
    tokens: usize,
    mut dx: Option<&mut Dx>,
) -> Result<()> {
    let (out, width) = (member.out_features(), member.in_features());
    let dy_mat = || Mat::new(dy, tokens, out);
    if let Some(dx) = dx.as_deref_mut() {
        dx.add(dy_mat(), &member.weight)?;
    }
    if let Some(param) = member.weight.param() {
        param.accumulate_grad(|g| matmul(g, width, dy_mat().t(), Mat::new(x, tokens, width), 1.0, 1.0))?;
    }
    if let Some(param) = member.bias.as_ref().and_then(Weight::param) {
        param.accumulate_grad(|g| pmetal_cpu::bias_grad(dy, out, g))?;
    }
    let (Some(adapter), Some(u)) = (&member.adapter, low_rank) else { return Ok(()) };
    let r = adapter.a.shape().dims()[0];
    if let Some(param) = adapter.b.param() {
        param.accumulate_grad(|g| matmul(g, r, dy_mat().t(), Mat::new(u, tokens, r), 1.0, 1.0))?;
    }
    let mut du = vec![0f32; tokens * r];
    product(&mut du, r, dy_mat(), &adapter.b, false, adapter.scale, 0.0)?;
    let du_mat = || Mat::new(&du, tokens, r);
    if let Some(param) = adapter.a.param() {
        let dropped = dropped(adapter, x, noise);
        let x = dropped.as_deref().unwrap_or(x);
        param.accumulate_grad(|g| matmul(g, width, du_mat().t(), Mat::new(x, tokens, width), 1.0, 1.0))?;
    }
    match (dx, mask_seed(adapter, noise)) {
        (Some(dx), None) => dx.add(du_mat(), &adapter.a),
        (Some(dx), Some(seed)) => dx.add_dropped(du_mat(), adapter, seed),
        (None, _) => Ok(()),
    }
}
