//! AdamW as torch.optim computes it, and the norm that gradient clipping needs.

use rayon::prelude::*;

use crate::simd::{CHUNK, simd_fn};

/// The settings of one AdamW step (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// The number of this step, counted from 1.
    pub step: u64,
}

/// The numbers a step needs, in the precision of the kernels: `g` is the gradient, `m` and `v` its moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// `p *= decay`, first of all.
    pub decay: f32,
    /// `m += weight1 * (g - m)`.
    pub weight1: f32,
    /// `v = beta2 * v + weight2 * g * g`.
    pub beta2: f32,
    /// See `beta2`.
    pub weight2: f32,
    /// `p -= step_size * m / (sqrt(v) / correction2 + eps)`.
    pub step_size: f32,
    /// See `step_size`.
    pub correction2: f32,
    /// See `step_size`.
    pub eps: f32,
}

/// One step of AdamW in torch's order: decay the parameter, update both moments with `g * grad_scale`, then move.
///
/// `p`, `m`, `v` and `g` have the same length; `m` and `v` start as zeros. `grad_scale` carries clipping and the
/// denominator of the loss.
pub fn adamw(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], grad_scale: f32, cfg: &AdamW) {
    for (name, len) in [("m", m.len()), ("v", v.len()), ("g", g.len())] {
        assert_eq!(p.len(), len, "adamw: {name}");
    }
    let f = cfg.factors();
    if p.len() <= CHUNK {
        return update(p, m, v, g, grad_scale, f);
    }
    let states = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    p.par_chunks_mut(CHUNK)
        .zip(states)
        .zip(g.par_chunks(CHUNK))
        .for_each(|((p, (m, v)), g)| update(p, m, v, g, grad_scale, f));
}

impl AdamW {
    /// What the kernels of every device compute with.
    pub fn factors(&self) -> Factors {
        let (lr, beta1, beta2) = (decimal(self.learning_rate), decimal(self.beta1), decimal(self.beta2));
        let step = self.step as f64;
        Factors {
            decay: (1.0 - lr * decimal(self.weight_decay)) as f32,
            weight1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            weight2: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powf(step))) as f32,
            correction2: (1.0 - beta2.powf(step)).sqrt() as f32,
            eps: self.eps,
        }
    }
}

/// The decimal number that was meant: `1 - 0.999` is off by 1e-5 of itself when 0.999 went through f32, and torch
/// computes it in f64.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

simd_fn! {
    fn update['a;](p: &'a mut [f32], m: &'a mut [f32], v: &'a mut [f32], g: &'a [f32], grad_scale: f32, f: Factors) -> () {
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * grad_scale;
            *m += f.weight1 * (g - *m);
            *v = *v * f.beta2 + f.weight2 * g * g;
            let root = v.sqrt() / f.correction2 + f.eps;
            *p = *p * f.decay - f.step_size * (*m / root);
        }
    }
}

/// The sum of squares, for the norm of a gradient. NaN and infinity come through.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    if x.len() <= CHUNK {
        return squares(x);
    }
    let partials: Vec<f64> = x.par_chunks(CHUNK).map(squares).collect();
    partials.iter().sum()
}

simd_fn! {
    fn squares['a;](x: &'a [f32]) -> f64 {
        let mut sums = [0.0f64; 32];
        let (chunks, tail) = x.as_chunks::<32>();
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        sums.iter().sum::<f64>() + tail.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
    }
}
