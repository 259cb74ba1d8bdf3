//! AdamW over an arena in one pass, and the norm that clipping needs.
//!
//! `p -= lr * wd * p`, then `p -= lr * m̂ / (sqrt(v̂) + eps)` with bias-corrected moments. Source: Loshchilov and Hutter, "Decoupled
//! Weight Decay Regularization", 2017, in the order of operations of `torch.optim.AdamW`.

pub use pmetal_cpu::AdamW;

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Arena, Result,
    kernel::{View, with_slice_mut},
    place::{Place, place},
    profile,
};

const OP: &str = "adamw";

/// Threadgroups of the norm's first launch: its bits depend on their number, and no more fit on a GPU at a time.
const NORM_GROUPS: usize = 512;

/// What a step did, where it was computed: `[4]` f32, the norm of all gradients together, the factor that clipped them, 1 where the step
/// was taken and 0 where norm or loss is not finite, the loss.
#[derive(Clone, Debug)]
pub struct StepOutcome(Tensor);

impl StepOutcome {
    /// The norm of all gradients before clipping, and whether the step was taken. Waits for the device.
    pub fn read(&self) -> Result<(f64, bool)> {
        let outcome = self.0.to_vec1::<f32>()?;
        Ok((f64::from(outcome[0]), outcome[2] != 0.0))
    }
}

/// Clips the gradients to `max_grad_norm` (0: not), updates every parameter of the arena, and forgets the gradients.
///
/// Where `loss` (an f32 scalar) or the norm is not finite, nothing is updated. The host does not wait for anything.
pub fn adamw(arena: &Arena, config: &AdamW, max_grad_norm: f64, loss: &Tensor) -> Result<StepOutcome> {
    let _span = profile::span(OP);
    let grads = arena.grads()?;
    let outcome = match place(grads, OP)? {
        Place::Gpu(gpu) => on_gpu(&*gpu, arena, grads, config, max_grad_norm, loss)?,
        Place::Cpu => on_cpu(arena, grads, config, max_grad_norm, loss)?,
        Place::Reference => reference(arena, grads, config, max_grad_norm, loss)?,
    };
    arena.touch();
    // gradients are read for their norm and again; parameters and moments are read and written
    profile::moved(&[grads, grads, arena.state(), arena.state()]);
    arena.clear_grads();
    Ok(StepOutcome(outcome))
}

/// `torch.nn.utils.clip_grad_norm_`'s factor.
fn clip_factor(norm: f64, max_grad_norm: f64) -> f32 {
    let clip = max_grad_norm / (norm + 1e-6);
    if max_grad_norm > 0.0 && clip < 1.0 { clip as f32 } else { 1.0 }
}

fn on_cpu(arena: &Arena, grads: &Tensor, config: &AdamW, max_grad_norm: f64, loss: &Tensor) -> Result<Tensor> {
    let view = View::of_tensor(grads, OP)?;
    let g = view.slice::<f32>()?;
    let (norm, loss) = (pmetal_cpu::sum_of_squares(g).sqrt(), loss.to_scalar::<f32>()?);
    let (clip, finite) = (clip_factor(norm, max_grad_norm), norm.is_finite() && loss.is_finite());
    if finite {
        with_slice_mut::<f32, _>(arena.state(), OP, |state| {
            let (p, moments) = state.split_at_mut(g.len());
            let (m, v) = moments.split_at_mut(g.len());
            pmetal_cpu::adamw(p, m, v, g, clip, config);
        })?;
        arena.refresh_copies()?;
    }
    Ok(Tensor::new(&[norm as f32, clip, f32::from(u8::from(finite)), loss], &Device::Cpu)?)
}

fn on_gpu(
    gpu: &dyn Gpu,
    arena: &Arena,
    grads: &Tensor,
    config: &AdamW,
    max_grad_norm: f64,
    loss: &Tensor,
) -> Result<Tensor> {
    let (n, device) = (arena.len(), grads.device());
    let groups = n.div_ceil(256 * 16).clamp(1, NORM_GROUPS);
    let partials = empty(groups, DType::F32, device)?;
    let outcome = empty(4, DType::F32, device)?;
    let params = kernels::NormParams { n: n as u64 };
    kernels::grad_norm_partials(gpu, DType::F32, Grid::line(groups, 256), grads, &partials, params)?;
    let params = kernels::FinishParams { partials: groups as u32, max_grad_norm: max_grad_norm as f32 };
    let loss = loss.reshape(1)?;
    kernels::grad_norm_finish(gpu, DType::F32, Grid::line(1, 256), &partials, &loss, &outcome, params)?;
    let f = config.factors();
    let grid = Grid::cover(n, 4);
    let params = kernels::AdamWParams {
        n: n as u64,
        decay: f.decay,
        weight1: f.weight1,
        beta2: f.beta2,
        weight2: f.weight2,
        step_size: f.step_size,
        correction2: f.correction2,
        eps: f.eps,
        grad_scale: 1.0,
    };
    if let Some(copies) = arena.copies() {
        kernels::adamw_with_copy(gpu, copies.dtype(), grid, grads, &outcome, arena.state(), copies, params)?;
    } else {
        kernels::adamw(gpu, DType::F32, grid, grads, &outcome, arena.state(), params)?;
        arena.refresh_copies()?;
    }
    Ok(outcome)
}

/// The formula in plain candle, for devices whose kernels are not used: it waits for the norm.
fn reference(arena: &Arena, grads: &Tensor, config: &AdamW, max_grad_norm: f64, loss: &Tensor) -> Result<Tensor> {
    let norm = f64::from(grads.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
    let loss = loss.to_scalar::<f32>()?;
    let (clip, finite) = (clip_factor(norm, max_grad_norm), norm.is_finite() && loss.is_finite());
    if finite {
        let f = config.factors();
        let g = (grads * f64::from(clip))?;
        let [p, m, v] = [0, 1, 2].map(|row| arena.state().get(row));
        let (p, m, v) = (p?, m?, v?);
        let m = (&m + ((&g - &m)? * f64::from(f.weight1))?)?;
        let v = ((v * f64::from(f.beta2))? + (g.sqr()? * f64::from(f.weight2))?)?;
        let root = ((v.sqrt()? / f64::from(f.correction2))? + f64::from(f.eps))?;
        let p = ((p * f64::from(f.decay))? - ((&m / root)? * f64::from(f.step_size))?)?;
        arena.state().slice_set(&Tensor::stack(&[p, m, v], 0)?, 0, 0)?;
        arena.refresh_copies()?;
    }
    Ok(Tensor::new(&[norm as f32, clip, f32::from(u8::from(finite)), loss], grads.device())?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Shape, Tensor};

    use super::*;

    /// ```python
    /// p = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    /// opt = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    /// for g in ([0.1, -0.2, 0.3], [0.4, 0.5, -0.6]):
    ///     p.grad = torch.tensor(g); opt.step(); print(p.tolist())
    /// ```
    #[test]
    fn two_steps_as_torch_takes_them() {
        let shape = Shape::from(3);
        let arena = Arena::new(&[("p".into(), shape)], DType::F32, &Device::Cpu).unwrap();
        let param = arena.param("p").unwrap();
        param.set(&Tensor::new(&[1f32, -2.0, 0.5], &Device::Cpu).unwrap()).unwrap();
        let expected = [TORCH_STEP_1, TORCH_STEP_2];
        for (i, g) in [[0.1f32, -0.2, 0.3], [0.4, 0.5, -0.6]].iter().enumerate() {
            param.add_grad(&Tensor::new(g, &Device::Cpu).unwrap()).unwrap();
            let config = AdamW {
                learning_rate: 0.1,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.01,
                step: i as u64 + 1,
            };
            adamw(&arena, &config, 0.0, &Tensor::new(1f32, &Device::Cpu).unwrap()).unwrap();
            let got = param.value().to_vec1::<f32>().unwrap();
            for (got, want) in got.iter().zip(expected[i]) {
                assert!((got - want).abs() < 1e-6, "step {i}: {got} {want}");
            }
        }
    }

    #[test]
    fn parameters_of_two_dtypes_are_clipped_and_moved_together() {
        let params = [("a".into(), Shape::from(2), DType::F32), ("b".into(), Shape::from(3), DType::BF16)];
        let arena = Arena::mixed(&params, &Device::Cpu).unwrap();
        let (a, b) = (arena.param("a").unwrap(), arena.param("b").unwrap());
        b.set(&Tensor::new(&[1f32, -2.0, 0.5], &Device::Cpu).unwrap()).unwrap();
        a.add_grad(&Tensor::new(&[3f32, 0.0], &Device::Cpu).unwrap()).unwrap();
        b.add_grad(&Tensor::new(&[0f32, 4.0, 0.0], &Device::Cpu).unwrap()).unwrap();
        let config = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
        let outcome = adamw(&arena, &config, 1.0, &Tensor::new(1f32, &Device::Cpu).unwrap()).unwrap();
        assert_eq!(outcome.read().unwrap(), (5.0, true));
        // the first step of Adam is the learning rate against the gradient's sign
        let read = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        assert!((read(a.value())[0] + 0.1).abs() < 1e-6 && read(a.value())[1] == 0.0);
        assert!((read(b.master())[1] + 2.1).abs() < 1e-6);
        let rounded = read(&b.master().to_dtype(DType::BF16).unwrap());
        assert_eq!((b.value().dtype(), read(b.value())), (DType::BF16, rounded));
    }

    const TORCH_STEP_1: [f32; 3] = [0.899, -1.898, 0.3995];
    const TORCH_STEP_2: [f32; 3] = [0.809_663_36, -1.940_323_6, 0.435_710_88];
}
