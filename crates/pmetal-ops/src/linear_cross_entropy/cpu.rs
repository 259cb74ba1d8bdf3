//! The head and the loss on the CPU, a block of tokens at a time.

use candle_core::{Device, Tensor};
use pmetal_cpu::{Arithmetic, Element, Left, Mat, cross_entropy_losses, cross_entropy_rows, matmul, multiply, softcap};

use super::{Found, OP, Task};
use crate::{
    Result,
    kernel::{CpuElement, View, for_dtype, room, tensor},
    profile,
};

/// Bytes of logits that exist at a time, roughly.
const BLOCK_BYTES: usize = 64 << 20;

pub(super) fn run(task: &Task) -> Result<Found> {
    let (hv, wv) = (View::of_tensor(task.hidden, OP)?, task.weight.view()?);
    let (vocab, width) = task.weight.shape().dims2()?;
    let (losses, dhidden) = for_dtype!(OP, task.hidden.dtype(), T => {
        let blocks = Blocks { task, hidden: hv.slice::<T>()?, weight: &wv, width, vocab };
        let (losses, dhidden) = blocks.all()?;
        Ok((losses, dhidden.map(|d| tensor(d, task.hidden.shape().clone())).transpose()?))
    })?;
    let sum: f64 = losses.iter().map(|&l| f64::from(l)).sum();
    let loss = Tensor::new((sum * f64::from(task.scale)) as f32, &Device::Cpu)?;
    let counted = losses.len();
    Ok(Found { loss, token_losses: tensor(losses, counted)?, dhidden })
}

struct Blocks<'a, T> {
    task: &'a Task<'a>,
    hidden: &'a [T],
    weight: &'a View<'a>,
    width: usize,
    vocab: usize,
}

impl<T: CpuElement> Blocks<'_, T> {
    /// The counted tokens' losses, and the gradient of `hidden` where it is needed; that of a trained weight goes to its arena.
    fn all(&self) -> Result<(Vec<f32>, Option<Vec<T>>)> {
        let Task { counted, classes, scale, spec, needs_hidden, trained, .. } = *self.task;
        let most = (BLOCK_BYTES / (4 * self.vocab)).clamp(8, 1024);
        // blocks of one size: a short last one would read all weights for little
        let rows = counted.len().div_ceil(counted.len().div_ceil(most).max(1)).max(1);
        let mut losses = vec![0f32; counted.len()];
        let mut dhidden = needs_hidden.then(|| vec![<T as Element>::ZERO; self.hidden.len()]);
        let mut logits = room::<f32>(rows.min(counted.len()) * self.vocab);
        let mut hidden = room::<T>(rows.min(counted.len()) * self.width);
        let mut gradient = if needs_hidden { room::<T>(hidden.len()) } else { Vec::new() };
        for ((block, classes), losses) in counted.chunks(rows).zip(classes.chunks(rows)).zip(losses.chunks_mut(rows)) {
            let n = block.len();
            let hidden = &mut hidden[..n * self.width];
            self.gather(block, hidden);
            let labels: Vec<i64> = classes.iter().map(|&class| i64::from(class)).collect();
            let logits = &mut logits[..n * self.vocab];
            let arithmetic = Arithmetic::of::<T>();
            let rows = Left::new(Mat::new(&*hidden, n, self.width), arithmetic);
            multiply(logits, self.vocab, &[(&rows, self.weight.right(self.vocab, self.width, true)?)], spec.scale, 0.0);
            let span = profile::span("cross_entropy");
            if let Some(cap) = spec.softcap {
                softcap(logits, cap);
            }
            if self.task.needs_gradient() {
                cross_entropy_rows(logits, self.vocab, &labels, scale * spec.scale, spec.softcap, losses);
            } else {
                cross_entropy_losses(logits, self.vocab, &labels, losses);
            }
            drop(span);
            if let Some(dhidden) = &mut dhidden {
                let gradient = &mut gradient[..n * self.width];
                let rows = Left::new(Mat::new(&*logits, n, self.vocab), arithmetic);
                let weight = self.weight.right(self.vocab, self.width, false)?;
                multiply(gradient, self.width, &[(&rows, weight)], 1.0, 0.0);
                for (&t, row) in block.iter().zip(gradient.chunks_exact(self.width)) {
                    dhidden[t as usize * self.width..][..self.width].copy_from_slice(row);
                }
            }
            if let Some(param) = trained {
                let dlogits = Mat::new(&*logits, n, self.vocab);
                param.accumulate_grad(|g| {
                    matmul(g, self.width, dlogits.t(), Mat::new(hidden, n, self.width), 1.0, 1.0)
                })?;
            }
        }
        Ok((losses, dhidden))
    }

    fn gather(&self, tokens: &[u32], into: &mut [T]) {
        for (&t, row) in tokens.iter().zip(into.chunks_exact_mut(self.width)) {
            row.copy_from_slice(&self.hidden[t as usize * self.width..][..self.width]);
        }
    }
}
