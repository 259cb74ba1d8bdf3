//! AdamW over an arena in one pass, and the norm that clipping needs.
//!
//! `p -= lr * wd * p`, then `p -= lr * m̂ / (sqrt(v̂) + eps)` with bias-corrected moments. Source: Loshchilov and Hutter, "Decoupled
//! Weight Decay Regularization", 2017, in the order of operations of `torch.optim.AdamW`.

pub use pmetal_cpu::AdamW;

use crate::{
    Arena, Result,
    kernel::{View, with_slice_mut},
};

const OP: &str = "adamw";

/// Updates every parameter of the arena from its gradient times `grad_scale`, and forgets the gradients.
pub fn adamw(arena: &Arena, config: &AdamW, grad_scale: f32) -> Result<()> {
    let grads = arena.grads()?;
    let view = View::of_tensor(grads, OP)?;
    let g = view.slice::<f32>()?;
    with_slice_mut::<f32, _>(arena.state(), OP, |state| {
        let (p, moments) = state.split_at_mut(g.len());
        let (m, v) = moments.split_at_mut(g.len());
        pmetal_cpu::adamw(p, m, v, g, grad_scale, config);
    })?;
    arena.refresh_copies()?;
    arena.clear_grads();
    Ok(())
}

/// The Euclidean norm of all gradients together; not finite where one of them is not.
pub fn grad_norm(arena: &Arena) -> Result<f64> {
    let view = View::of_tensor(arena.grads()?, "grad_norm")?;
    Ok(pmetal_cpu::sum_of_squares(view.slice::<f32>()?).sqrt())
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
            adamw(&arena, &config, 1.0).unwrap();
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
        assert_eq!(grad_norm(&arena).unwrap(), 5.0);
        let config = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
        adamw(&arena, &config, 1.0).unwrap();
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
