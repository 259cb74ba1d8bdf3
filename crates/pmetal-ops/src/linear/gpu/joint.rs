//! All frozen weights of a group and their adapters as one matrix, so that each direction is one large product.
//!
//! `E [N + R, K + R] = [[W, B], [A, ·]]`: the members' weights below one another, their `A [r, K]` below those, their `B [out, r]` behind
//! their own rows, zeros elsewhere. Forward is `[x | u] · [W | B]ᵀ` with `u = scale x Aᵀ` in free columns behind `x [tokens, K]`, the
//! gradient of the input `[dy | du] · [W; A]` with `du = scale dy B` behind `dy [tokens, N]`.

use std::{ops::Range, sync::Arc};

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, LowRankBackward, LowRankMember, empty, low_rank_forward};

use super::{
    add_dropped, dropped,
    placement::{Layout, Placement},
    product, weight_gradient,
};
use crate::{
    Result, Value, Weight,
    autograd::{keep, recording, unread},
    elementwise,
    linear::{LinearGroup, LinearMember, OP, kernel::mask_seed},
    profile,
    rows::{GradRows, same_memory},
};

/// The matrix of a group.
#[derive(Debug)]
pub(in crate::linear) struct Joint {
    /// `E`.
    matrix: Tensor,
    layout: Layout,
    /// `[N]`, where a member has a bias.
    bias: Option<Tensor>,
    /// How adapters come into the matrix; none where there are none.
    placement: Option<Arc<Placement>>,
}

impl Joint {
    /// The matrix of members whose weights are frozen on a GPU, which become views of it; none for others.
    pub(in crate::linear) fn of(members: &mut [LinearMember]) -> Result<Option<Self>> {
        let Some(layout) = Layout::of(members)? else { return Ok(None) };
        let matrix = layout.matrix(members)?;
        let bias = joint_bias(members, &layout, &matrix)?;
        let placement = if layout.r == 0 { None } else { Placement::of(members, &layout, &matrix)? };
        if layout.r > 0 && placement.is_none() {
            return Ok(None);
        }
        for (member, outputs) in members.iter_mut().zip(&layout.outputs) {
            let weight = matrix.narrow(0, outputs.start, outputs.len())?.narrow(1, 0, layout.k)?;
            member.weight = Weight::Frozen(weight);
        }
        Ok(Some(Self { matrix, layout, bias, placement }))
    }

    /// Free columns that the group wants behind its input.
    pub(in crate::linear) fn spare(&self) -> usize {
        self.layout.r
    }

    pub(in crate::linear) fn dtype(&self) -> DType {
        self.matrix.dtype()
    }

    fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Result<Tensor> {
        Ok(self.matrix.narrow(0, rows.start, rows.len())?.narrow(1, columns.start, columns.len())?)
    }

    fn a(&self, ranks: &Range<usize>) -> Result<Tensor> {
        let n = self.layout.n;
        self.part(n + ranks.start..n + ranks.end, 0..self.layout.k)
    }

    /// `x` with as many free columns behind it as the matrix has for `B`.
    fn input(&self, x: &Value) -> Result<Tensor> {
        let (tokens, k) = x.tensor().dims2()?;
        let width = k + self.layout.r;
        match x.spare() {
            Some(parent) if parent.dim(1)? >= width => Ok(parent.narrow(1, 0, width)?),
            _ if self.layout.r == 0 => Ok(x.tensor().clone()),
            _ => {
                let wide = empty((tokens, width), x.tensor().dtype(), x.tensor().device())?;
                wide.slice_set(&x.tensor().contiguous()?, 1, 0)?;
                Ok(wide)
            }
        }
    }

    fn low_rank_members<'a>(&self, gradients: &[Gradients<'a>]) -> Vec<LowRankMember<'a>> {
        let members = self.layout.outputs.iter().zip(&self.layout.ranks).zip(gradients);
        let with_adapter = members.filter(|((_, ranks), _)| !ranks.is_empty());
        let member = |((outputs, ranks), of): ((&Range<usize>, &Range<usize>), &Gradients<'a>)| LowRankMember {
            outputs: outputs.clone(),
            ranks: ranks.clone(),
            scale: of.scale,
            da: of.da,
            db: of.db,
        };
        with_adapter.map(member).collect()
    }
}

/// What the backward writes for one member.
#[derive(Clone, Copy, Default)]
struct Gradients<'a> {
    scale: f32,
    da: Option<(&'a Tensor, bool)>,
    db: Option<(&'a Tensor, bool)>,
}

impl<'a> Gradients<'a> {
    /// Where the gradients of a member's adapter lie; that of an `A` that saw its input through dropout is formed elsewhere.
    fn of(member: &'a LinearMember, dropping: bool) -> Self {
        let Some(adapter) = &member.adapter else { return Self::default() };
        let da = adapter.a.param().filter(|_| !dropping).map(|a| a.grad_target());
        Self { scale: adapter.scale, da, db: adapter.b.param().map(|b| b.grad_target()) }
    }
}

/// Each member's result.
pub(in crate::linear) fn forward(
    gpu: &Arc<dyn Gpu>,
    group: &LinearGroup,
    joint: &Arc<Joint>,
    x: &Value,
    noise: Option<u64>,
) -> Result<Vec<Value>> {
    let Layout { n, k, r, outputs, ranks } = &joint.layout;
    let (tokens, _) = x.tensor().dims2()?;
    let input = joint.input(x)?;
    if let Some(placement) = &joint.placement {
        placement.refresh(&**gpu)?;
        half_products(&**gpu, group, joint, &input, noise)?;
    }
    let compute = || {
        group.members.iter().for_each(|member| member.count(tokens, input.dtype()));
        let y = empty((tokens, *n), input.dtype(), input.device())?;
        product(&**gpu, &input, &joint.part(0..*n, 0..k + r)?, true, &y, 1.0, 0.0)?;
        if let Some(bias) = &joint.bias {
            elementwise::bias_add(&y, bias)?;
        }
        Ok(vec![y])
    };
    let y = match unread((tokens, *n), input.dtype(), input.device())? {
        Some(y) => y,
        None => keep(OP, compute)?.swap_remove(0),
    };
    let results = outputs.iter().map(|range| Ok(y.narrow(1, range.start, range.len())?)).collect::<Result<Vec<_>>>()?;
    if !recording() {
        return Ok(results.into_iter().map(Value::constant).collect());
    }
    let grad_rows = GradRows::new(tokens, n + r);
    let needs_dx = x.requires_grad();
    // a frozen product needs its input no more
    let trained = group.trainable();
    let saved = Backward {
        gpu: gpu.clone(),
        joint: joint.clone(),
        group: group.clone(),
        input: (trained || ranks.iter().any(|ranks| !ranks.is_empty())).then_some(input),
        grad_rows: grad_rows.clone(),
        noise,
    };
    let values = Value::record_if(trained, results, &[x], move |grads| {
        profile::work(|| saved.group.backward_flops(tokens * saved.joint.layout.k, needs_dx));
        Ok(vec![saved.run(grads, needs_dx)?])
    });
    let place = |(value, range): (Value, &Range<usize>)| value.with_grad_place(grad_rows.place(range.start));
    Ok(values.into_iter().zip(outputs).map(place).collect())
}

/// Fills the columns behind the input with `scale * dropout(x) Aᵀ`.
fn half_products(gpu: &dyn Gpu, group: &LinearGroup, joint: &Joint, input: &Tensor, noise: Option<u64>) -> Result<()> {
    let Layout { n, k, r, ranks, .. } = &joint.layout;
    let (x, u) = (input.narrow(1, 0, *k)?, input.narrow(1, *k, *r)?);
    if !drops(group, noise) {
        let scales: Vec<_> =
            group.members.iter().map(|m| Gradients { scale: m.scale(), ..Default::default() }).collect();
        let a = joint.part(*n..n + r, 0..*k)?;
        return Ok(low_rank_forward(gpu, &x, &a, &u, &joint.low_rank_members(&scales))?);
    }
    for (member, ranks) in group.members.iter().zip(ranks) {
        let Some(adapter) = &member.adapter else { continue };
        let u = u.narrow(1, ranks.start, ranks.len())?;
        product(gpu, &dropped(adapter, &x, noise)?, &joint.a(ranks)?, true, &u, adapter.scale, 0.0)?;
    }
    Ok(())
}

fn drops(group: &LinearGroup, noise: Option<u64>) -> bool {
    group.members.iter().any(|member| member.adapter.as_ref().is_some_and(|a| mask_seed(a, noise).is_some()))
}

/// What the backward needs.
struct Backward {
    gpu: Arc<dyn Gpu>,
    joint: Arc<Joint>,
    group: LinearGroup,
    /// `[x | u]`.
    input: Option<Tensor>,
    grad_rows: Arc<GradRows>,
    noise: Option<u64>,
}

impl Backward {
    /// Adds the gradients of the adapters to the arena; returns that of the input where it is needed.
    fn run(&self, grads: Vec<Option<Tensor>>, needs_dx: bool) -> Result<Option<Tensor>> {
        let Layout { n, k, r, .. } = self.joint.layout;
        let dy = self.gathered(grads)?;
        let dropping = drops(&self.group, self.noise);
        if let Some(input) = &self.input
            && r > 0
        {
            self.adapters(input, &dy, dropping)?;
        }
        if !needs_dx {
            return Ok(None);
        }
        let dx = empty((dy.dim(0)?, k), dy.dtype(), dy.device())?;
        let depth = if dropping { n } else { n + r };
        let weights = self.joint.part(0..depth, 0..k)?;
        product(&*self.gpu, &dy.narrow(1, 0, depth)?, &weights, false, &dx, 1.0, 0.0)?;
        if dropping {
            self.through_dropout(&dx, &dy)?;
        }
        Ok(Some(dx))
    }

    /// The gradients of all results side by side, `[tokens, N + R]`, the last columns free.
    fn gathered(&self, grads: Vec<Option<Tensor>>) -> Result<Tensor> {
        let Layout { n, r, outputs, .. } = &self.joint.layout;
        if let ([Some(dy)], 0) = (&grads[..], r) {
            return Ok(dy.contiguous()?);
        }
        let (dtype, device) = (self.joint.dtype(), self.joint.matrix.device());
        let all = self.grad_rows.parent(dtype, device)?;
        for (grad, range) in grads.into_iter().zip(outputs) {
            let place = all.narrow(1, range.start, range.len())?;
            match grad {
                Some(grad) if same_memory(&grad, &place) => {}
                Some(grad) => all.slice_set(&grad.contiguous()?, 1, range.start)?,
                None => all.slice_set(&Tensor::zeros(place.shape(), dtype, device)?, 1, range.start)?,
            }
        }
        debug_assert_eq!(all.dims()[1], n + r);
        Ok(all)
    }

    /// Fills the columns behind `dy` with `du`, and adds the gradients of `A` and `B`.
    fn adapters(&self, input: &Tensor, dy: &Tensor, dropping: bool) -> Result<()> {
        let Layout { n, k, r, ranks, .. } = &self.joint.layout;
        let members = &self.group.members;
        let gradients: Vec<_> = members.iter().map(|member| Gradients::of(member, dropping)).collect();
        let (x, u) = (input.narrow(1, 0, *k)?, input.narrow(1, *k, *r)?);
        let du = dy.narrow(1, *n, *r)?;
        let low_rank_members = self.joint.low_rank_members(&gradients);
        let joined = if dropping { None } else { joined_da(members, &low_rank_members, *k)? };
        self.gpu.low_rank_backward(&LowRankBackward {
            dy: &dy.narrow(1, 0, *n)?,
            b: &self.joint.part(0..*n, *k..k + r)?,
            x: &x,
            u: &u,
            du: &du,
            members: &low_rank_members,
            joined_da: joined.as_ref().map(|(da, fresh)| (da, *fresh)),
        })?;
        for (member, ranks) in members.iter().zip(ranks).filter(|_| dropping) {
            let Some(adapter) = &member.adapter else { continue };
            if let Some(param) = adapter.a.param() {
                let du = du.narrow(1, ranks.start, adapter.rank())?;
                weight_gradient(&*self.gpu, param, &du, &dropped(adapter, &x, self.noise)?)?;
            }
        }
        Ok(())
    }

    /// Adds what reaches the input through dropout.
    fn through_dropout(&self, dx: &Tensor, dy: &Tensor) -> Result<()> {
        for (member, ranks) in self.group.members.iter().zip(&self.joint.layout.ranks) {
            let Some(adapter) = &member.adapter else { continue };
            let du = dy.narrow(1, self.joint.layout.n + ranks.start, ranks.len())?;
            let a = self.joint.a(ranks)?;
            match mask_seed(adapter, self.noise) {
                Some(seed) => add_dropped(&*self.gpu, dx, &du, &a, seed, adapter.dropout)?,
                None => product(&*self.gpu, &du, &a, false, dx, 1.0, 1.0)?,
            }
        }
        Ok(())
    }
}

/// The gradients of all `A` as one tensor, where they lie below one another in the arena.
fn joined_da(members: &[LinearMember], of: &[LowRankMember], k: usize) -> Result<Option<(Tensor, bool)>> {
    let params = members.iter().filter_map(|member| member.adapter.as_ref()).map(|adapter| adapter.a.param());
    let Some(params) = params.collect::<Option<Vec<_>>>() else { return Ok(None) };
    let [first, ..] = params[..] else { return Ok(None) };
    let (mut end, mut last_end) = (first.first(), of.first().map_or(0, |member| member.ranks.start));
    let mut fresh = None;
    for (param, member) in params.iter().zip(of) {
        let (Some((da, is_fresh)), true) = (member.da, param.first() == end) else { return Ok(None) };
        let rank = da.dim(0)?;
        if member.ranks.start != last_end || *fresh.get_or_insert(is_fresh) != is_fresh {
            return Ok(None);
        }
        (end, last_end) = (end + rank * k, last_end + rank);
    }
    let ranks = (end - first.first()) / k.max(1);
    let Some(fresh) = fresh else { return Ok(None) };
    Ok(Some((first.arena().grads_at(first.first(), end - first.first())?.reshape((ranks, k))?, fresh)))
}

fn joint_bias(members: &[LinearMember], layout: &Layout, matrix: &Tensor) -> Result<Option<Tensor>> {
    if members.iter().all(|member| member.bias.is_none()) {
        return Ok(None);
    }
    let parts = members.iter().zip(&layout.outputs).map(|(member, outputs)| match &member.bias {
        Some(bias) => bias.tensor_in(matrix.dtype()),
        None => Ok(Tensor::zeros(outputs.len(), matrix.dtype(), matrix.device())?),
    });
    Ok(Some(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?))
}
