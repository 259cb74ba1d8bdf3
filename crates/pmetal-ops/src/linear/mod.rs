//! Several projections of one input, each with or without an adapter.
//!
//! For each member: `y = x Wᵀ + bias + scale * dropout(x) Aᵀ Bᵀ`, with `x [tokens, in]`, `W [out, in]`, `A [r, in]`, `B [out, r]`.
//! Source of the low-rank term: Hu et al., "LoRA", 2021. A frozen weight never gets a gradient; trained weights and adapters
//! accumulate theirs straight into the arena.

mod gpu;
mod kernel;
mod reference;

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::{
    Error, Result, Value, Weight,
    autograd::{composite, recording},
    place::{Place, place},
    profile,
};

pub(crate) use gpu::{Placements, product, weight_gradient};

const OP: &str = "linear";

/// The low-rank update of one linear layer.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `[r, in]` f32.
    pub a: Weight,
    /// `[out, r]` f32.
    pub b: Weight,
    /// `alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA.
    pub scale: f32,
    /// Share of the input's elements zeroed in training, in `[0, 1)`.
    pub dropout: f32,
    /// Tells this adapter's dropout from all others.
    pub place: u64,
}

impl Adapter {
    fn rank(&self) -> usize {
        self.a.shape().dims().first().copied().unwrap_or(0)
    }
}

/// One projection.
#[derive(Clone, Debug)]
pub struct LinearMember {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Weight>,
    /// The low-rank update, where there is one.
    pub adapter: Option<Adapter>,
}

impl LinearMember {
    /// Width of its result.
    pub fn out_features(&self) -> usize {
        self.weight.shape().dims().first().copied().unwrap_or(0)
    }

    /// Width of its input.
    pub fn in_features(&self) -> usize {
        self.weight.shape().dims().get(1).copied().unwrap_or(0)
    }

    /// Width of the low-rank update, 0 where there is none.
    fn rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, Adapter::rank)
    }

    /// Counts the product with the weight and with an adapter's second half: what a layer that runs again may leave out.
    fn count(&self, tokens: usize, dtype: DType) {
        let outputs = self.out_features();
        profile::work(|| 2.0 * (tokens * outputs * (self.in_features() + self.rank())) as f64);
        profile::traffic(|| (self.weight.size_in_bytes() + tokens * outputs * dtype.size_in_bytes()) as f64);
    }

    fn trainable(&self) -> bool {
        let adapter = self.adapter.iter().flat_map(|a| [&a.a, &a.b]);
        std::iter::once(&self.weight).chain(&self.bias).chain(adapter).any(|w| w.param().is_some())
    }
}

/// Projections that read the same input: q, k and v; gate and up; or one alone.
#[derive(Clone, Debug)]
pub struct LinearGroup {
    members: Vec<LinearMember>,
    /// Their frozen weights side by side, on a GPU.
    joint: Option<Arc<gpu::Joint>>,
}

impl LinearGroup {
    /// A group of projections, in the order of the results. On a GPU frozen weights are copied into one matrix.
    pub fn new(members: Vec<LinearMember>) -> Result<Self> {
        let mut group = Self { members, joint: None };
        group.join()?;
        Ok(group)
    }

    /// The projections, in the order of the results.
    pub fn members(&self) -> &[LinearMember] {
        &self.members
    }

    /// Changes the projections: puts adapters on them, or takes them away.
    pub fn change(&mut self, f: impl FnOnce(&mut [LinearMember])) -> Result<()> {
        f(&mut self.members);
        self.join()
    }

    /// The weight `[out, in]` of member `place` with what its adapter adds, in the weight's dtype. No gradient is recorded.
    ///
    /// # Errors
    /// Where there is no such member.
    pub fn merged(&self, place: usize) -> Result<Tensor> {
        let member = self.members.get(place).ok_or_else(|| Error::operand(OP, "member", self.members.len(), place))?;
        let weight = member.weight.tensor()?;
        let Some(Adapter { a, b, scale, .. }) = &member.adapter else { return Ok(weight) };
        let [a, b] = [a.tensor_in(DType::F32)?, b.tensor_in(DType::F32)?];
        let sum = (weight.to_dtype(DType::F32)? + (b.matmul(&a)? * f64::from(*scale))?)?;
        Ok(sum.to_dtype(weight.dtype())?)
    }

    fn join(&mut self) -> Result<()> {
        self.joint = None;
        self.joint = gpu::Joint::of(&mut self.members)?.map(Arc::new);
        Ok(())
    }

    /// Columns that whoever makes the input should leave free behind its rows, for the adapters' part of the product.
    pub fn spare_columns(&self) -> usize {
        self.joint.as_ref().map_or(0, |joint| joint.spare())
    }

    /// Projects `x [tokens, in]` and returns `[tokens, out]` for each member, in the dtype of `x`; on a GPU they may be column ranges of one
    /// tensor.
    ///
    /// `noise` seeds the adapters' dropout; without it (evaluation, generation) there is none.
    pub fn forward(&self, x: &Value, noise: Option<u64>) -> Result<Vec<Value>> {
        self.check(x)?;
        let (tokens, width) = x.tensor().dims2()?;
        let _span = profile::span((OP, [width, self.members.iter().map(LinearMember::out_features).sum()]));
        profile::moved(&[x.tensor()]);
        profile::work(|| 2.0 * self.members.iter().map(|m| tokens * m.rank() * width).sum::<usize>() as f64);
        match place(x.tensor(), OP)? {
            Place::Cpu => self.by_kernels(
                x,
                |group, x| kernel::forward(group, x, noise),
                move |group, x, grads, low_ranks, needs_dx| {
                    kernel::backward(group, x, grads, low_ranks, noise, needs_dx)
                },
            ),
            Place::Gpu(gpu) => match &self.joint {
                Some(joint) if joint.dtype() == x.tensor().dtype() => gpu::forward(&gpu, self, joint, x, noise),
                _ => self.by_kernels(x, |group, x| gpu::each::forward(&*gpu, group, x, noise), {
                    let gpu = gpu.clone();
                    move |group, x, grads, low_ranks, needs_dx| {
                        gpu::each::backward(&*gpu, group, x, grads, low_ranks, noise, needs_dx)
                    }
                }),
            },
            Place::Reference => {
                let (inputs, plan) = reference::plan(self, x, noise)?;
                composite(&inputs.iter().collect::<Vec<_>>(), move |t| reference::run(t, &plan))
            }
        }
    }

    fn check(&self, x: &Value) -> Result<()> {
        let (_, width) = x.tensor().dims2()?;
        for member in &self.members {
            let out = member.out_features();
            let operand = |what: &str, weight: &Weight, want: Vec<usize>| {
                if weight.shape().dims() == want {
                    Ok(())
                } else {
                    Err(Error::operand(OP, what, want, weight.shape().dims()))
                }
            };
            operand("weight", &member.weight, vec![out, width])?;
            if let Some(bias) = &member.bias {
                operand("bias", bias, vec![out])?;
            }
            if let Some(adapter) = &member.adapter {
                let r = adapter.a.shape().dims().first().copied().unwrap_or(0);
                operand("adapter's A", &adapter.a, vec![r, width])?;
                operand("adapter's B", &adapter.b, vec![out, r])?;
            }
        }
        Ok(())
    }

    /// Floating-point operations of the products backward, for an input of `elements`: gradients of trained weights, of low-rank halves, and of the input where it is needed.
    fn backward_flops(&self, elements: usize, needs_dx: bool) -> f64 {
        let of_member = |m: &LinearMember| {
            let (outputs, rank) = (m.out_features(), m.rank());
            let dx = if needs_dx { m.in_features() * (outputs + rank) } else { 0 };
            let dw = if m.weight.param().is_some() { m.in_features() * outputs } else { 0 };
            dx + dw + rank * (m.in_features() + 2 * outputs)
        };
        let width = self.members.first().map_or(1, LinearMember::in_features).max(1);
        2.0 * (elements / width * self.members.iter().map(of_member).sum::<usize>()) as f64
    }

    fn trainable(&self) -> bool {
        self.members.iter().any(LinearMember::trainable)
    }

    /// The group by a device's kernels: `forward` gives each member's result and what its backward needs of the low-rank part, `backward` the
    /// gradient of the input.
    fn by_kernels<L: Send + 'static>(
        &self,
        x: &Value,
        forward: impl FnOnce(&Self, &Tensor) -> Result<Vec<(Tensor, L)>>,
        backward: impl FnOnce(&Self, &Tensor, Vec<Option<Tensor>>, &[L], bool) -> Result<Option<Tensor>> + Send + 'static,
    ) -> Result<Vec<Value>> {
        let x_t = x.tensor().contiguous()?;
        let (outputs, low_ranks): (Vec<_>, Vec<_>) = forward(self, &x_t)?.into_iter().unzip();
        if !recording() {
            return Ok(outputs.into_iter().map(Value::constant).collect());
        }
        let (group, needs_dx) = (self.clone(), x.requires_grad());
        Ok(Value::record_if(self.trainable(), outputs, &[x], move |grads| {
            profile::work(|| group.backward_flops(x_t.elem_count(), needs_dx));
            backward(&group, &x_t, grads, &low_ranks, needs_dx).map(|dx| vec![dx])
        }))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        Arena, gradients,
        testing::{assert_close, check_op, emulated, random},
    };

    const NAMES: [&str; 8] = ["w0", "bias", "w1", "w2", "a0", "a2", "b0", "b2"];

    /// A member with bias and adapter, one with neither, and one with an adapter of another rank. Weights that the arena lacks are frozen.
    fn group_of(arena: &Arena, inputs: &[Tensor], dtype: DType, dropout: f32) -> LinearGroup {
        let weight = |name: &str| match arena.param(name) {
            Some(param) => Weight::Trainable(param),
            None => {
                let place = NAMES.iter().position(|n| *n == name).unwrap();
                Weight::Frozen(inputs[1 + place].to_dtype(dtype).unwrap())
            }
        };
        let adapter = |a: &str, b: &str, scale| Adapter { a: weight(a), b: weight(b), scale, dropout, place: 9 };
        let (first, third) = (Some(adapter("a0", "b0", 1.5)), Some(adapter("a2", "b2", 0.5)));
        let members = vec![
            LinearMember { weight: weight("w0"), bias: Some(weight("bias")), adapter: first },
            LinearMember { weight: weight("w1"), bias: None, adapter: None },
            LinearMember { weight: weight("w2"), bias: None, adapter: third },
        ];
        LinearGroup::new(members).unwrap()
    }

    /// Outputs, gradient of x, and gradients of the parameters, which are those in `trained`.
    fn run(inputs: &[Tensor], trained: &[&str], dtype: DType, dropout: f32) -> (Vec<Tensor>, Vec<Tensor>) {
        let of = |name: &&str| &inputs[1 + NAMES.iter().position(|n| n == name).unwrap()];
        let shapes: Vec<_> = trained.iter().map(|n| (n.to_string(), of(n).shape().clone())).collect();
        let arena = Arena::new(&shapes, DType::F32, &Device::Cpu).unwrap();
        for name in trained {
            arena.param(name).unwrap().set(&of(name).to_dtype(DType::F32).unwrap()).unwrap();
        }
        let x = Value::variable(inputs[0].to_dtype(dtype).unwrap());
        let ys = group_of(&arena, inputs, dtype, dropout).forward(&x, Some(3)).unwrap();
        let outputs: Vec<Tensor> = ys.iter().map(|y| y.tensor().clone()).collect();
        let roots = ys.into_iter().enumerate().map(|(i, y)| {
            let dy = random(y.tensor().dims(), 90 + i as u64).to_dtype(dtype).unwrap();
            (y, dy)
        });
        let mut grads: Vec<Tensor> =
            gradients(roots.collect(), &[&x]).unwrap().into_iter().map(Option::unwrap).collect();
        grads.extend(arena.params().map(|p| p.grad().unwrap()));
        (outputs, grads)
    }

    #[test]
    fn products_adapters_and_their_gradients() {
        // few rows take another way than many, and frozen weights on a GPU another than trained ones
        for trained in [&NAMES[..], &NAMES[4..], &["a0", "b0", "a2", "b2"], &[]] {
            for (tokens, dropout) in [(5, 0.0), (5, 0.4), (21, 0.0), (21, 0.4)] {
                let shapes: [&[usize]; 9] =
                    [&[tokens, 12], &[7, 12], &[7], &[4, 12], &[5, 12], &[3, 12], &[2, 12], &[7, 3], &[5, 2]];
                let inputs: Vec<Tensor> = shapes.iter().zip(1..).map(|(shape, seed)| random(shape, seed)).collect();
                // x in f64 has no kernel, so the first run goes the reference path
                let (want, want_grads) = run(&inputs, trained, DType::F64, dropout);
                for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 3e-2)] {
                    let again = || run(&inputs, trained, dtype, dropout);
                    for (place, (got, got_grads)) in [("CPU", again()), ("GPU", emulated(again))] {
                        for (want, got) in want.iter().chain(&want_grads).zip(got.iter().chain(&got_grads)) {
                            let what = format!("{place}, {tokens} tokens of {dtype:?}, dropout {dropout}, {trained:?}");
                            assert_close(want, got, tolerance, &what);
                        }
                    }
                }
            }
        }
    }

    /// An adapter put on later, changed, and taken off again.
    #[test]
    fn the_matrix_of_a_group_follows_its_adapters() {
        emulated(|| {
            let [x, w, a, b] = [(6, 8), (5, 8), (2, 8), (5, 2)]
                .map(|(rows, columns)| random(&[rows, columns], (rows * columns) as u64).to_dtype(DType::F32).unwrap());
            let product = |a: &Tensor, b: &Tensor| a.matmul(&b.t().unwrap()).unwrap();
            let without = product(&x, &w);
            let member = LinearMember { weight: Weight::Frozen(w), bias: None, adapter: None };
            let mut group = LinearGroup::new(vec![member]).unwrap();
            let input = Value::constant(x.clone());
            let result = |group: &LinearGroup| group.forward(&input, None).unwrap()[0].tensor().clone();
            assert_close(&without, &result(&group), 1e-6, "without");

            let shapes = [("a".to_owned(), a.shape().clone()), ("b".to_owned(), b.shape().clone())];
            let arena = Arena::new(&shapes, DType::F32, &Device::Cpu).unwrap();
            let [pa, pb] = ["a", "b"].map(|name| arena.param(name).unwrap());
            let [wa, wb] = [&pa, &pb].map(|param| Weight::Trainable(param.clone()));
            let adapter = Adapter { a: wa, b: wb, scale: 0.5, dropout: 0.0, place: 0 };
            group.change(|members| members[0].adapter = Some(adapter)).unwrap();
            assert_close(&without, &result(&group), 1e-6, "an adapter of zeros");
            pa.set(&a).unwrap();
            pb.set(&b).unwrap();
            let with = (&without + (product(&product(&x, &a), &b) * 0.5).unwrap()).unwrap();
            assert_close(&with, &result(&group), 1e-6, "an adapter that has changed");
            group.change(|members| members[0].adapter = None).unwrap();
            assert_close(&without, &result(&group), 1e-6, "without again");
        });
    }

    #[test]
    fn the_reference_against_central_differences() {
        let shapes: [&[usize]; 4] = [&[3, 5], &[4, 5], &[2, 5], &[4, 2]];
        let inputs: Vec<Tensor> = shapes.iter().zip(1..).map(|(shape, seed)| random(shape, seed)).collect();
        let formula = |t: &[Tensor]| {
            let low = t[0].matmul(&t[2].t()?)?.matmul(&t[3].t()?)?;
            Ok(vec![(t[0].matmul(&t[1].t()?)? + (low * 0.5)?)?])
        };
        check_op(&inputs, formula, |v| {
            let weight = |i: usize| Weight::Frozen(v[i].tensor().to_dtype(DType::F32).unwrap());
            let adapter = Adapter { a: weight(2), b: weight(3), scale: 0.5, dropout: 0.0, place: 0 };
            let group = LinearGroup::new(vec![LinearMember { weight: weight(1), bias: None, adapter: Some(adapter) }])?;
            // frozen here: the gradients of weights are proved above, so the oracle's are let through
            let reference = composite(&v.iter().collect::<Vec<_>>(), formula)?;
            let y = group.forward(&v[0], None)?;
            assert_close(reference[0].tensor(), y[0].tensor(), 2e-2, "group");
            Ok(reference)
        });
    }

    #[test]
    fn a_frozen_group_on_a_constant_records_nothing() {
        let weight = Weight::Frozen(random(&[4, 6], 1).to_dtype(DType::F32).unwrap());
        let group = LinearGroup::new(vec![LinearMember { weight, bias: None, adapter: None }]).unwrap();
        let x = Value::constant(random(&[2, 6], 2).to_dtype(DType::F32).unwrap());
        assert!(!group.forward(&x, None).unwrap()[0].requires_grad());
    }
}
