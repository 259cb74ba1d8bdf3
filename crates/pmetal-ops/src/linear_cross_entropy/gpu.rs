//! The head and the loss on a GPU, a block of tokens at a time. Logits and their gradients have the dtype of the hidden states; softmax and
//! losses are f32.

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use super::{Found, Task};
use crate::{
    Result,
    embedding::gather_on_gpu,
    linear::{product, weight_gradient},
    place::upload,
    profile,
};

/// Where no more than one token of so many is not counted, it is computed as if it were.
const FEW: usize = 8;

/// Rows of a tile of the matrix units.
const TILE: usize = 128;

pub(super) fn run(gpu: &dyn Gpu, task: &Task) -> Result<Found> {
    let (hidden, device, dtype) = (task.hidden, task.hidden.device(), task.hidden.dtype());
    let (tokens, width) = hidden.dims2()?;
    let vocab = task.weight.shape().dim(0)?;
    let counted = task.counted.len();
    // where few tokens are not counted, all are computed where they lie: the kernels leave out labels that are none
    let all = FEW * (tokens - counted) <= tokens;
    let n = if all { tokens } else { counted };
    let token_losses = Tensor::zeros(n, DType::F32, device)?;
    let loss = empty(1, DType::F32, device)?;
    let places = upload(task.counted, device)?;
    let mut dhidden = None;
    if counted > 0 {
        let head = task.weight.tensor_in(dtype)?;
        let labels = if all { upload(&labels_of_all(task, tokens), device)? } else { upload(task.classes, device)? };
        let rows = if all { hidden.clone() } else { gather_on_gpu(gpu, &places, hidden)? };
        let drows = task.needs_hidden.then(|| empty((n, width), dtype, device)).transpose()?;
        let most = block(n, task.logits_bytes / (dtype.size_in_bytes() * vocab));
        let logits = empty((most.min(n), vocab), dtype, device)?;
        for first in (0..n).step_by(most) {
            let len = most.min(n - first);
            let (x, logits) = (rows.narrow(0, first, len)?, logits.narrow(0, 0, len)?);
            let labels = labels.narrow(0, first, len)?;
            product(gpu, &x, &head, true, &logits, task.spec.scale, 0.0)?;
            entropy(gpu, task, &logits, &labels, &token_losses, first)?;
            if let Some(drows) = &drows {
                product(gpu, &logits, &head, false, &drows.narrow(0, first, len)?, 1.0, 0.0)?;
            }
            if let Some(param) = task.trained {
                weight_gradient(gpu, param, &logits, &x)?;
            }
        }
        dhidden = match drows {
            Some(drows) if !all => Some(scattered(gpu, &drows, &places, hidden)?),
            drows => drows,
        };
    } else if task.needs_hidden {
        dhidden = Some(hidden.zeros_like()?);
    }
    let params = kernels::SumParams { n: n as u32, scale: task.scale };
    kernels::sum_scaled(gpu, DType::F32, Grid::line(1, 1024), &token_losses, &loss, params)?;
    let token_losses = if n == counted { token_losses } else { token_losses.index_select(&places, 0)? };
    Ok(Found { loss: loss.reshape(())?, token_losses, dhidden })
}

/// A label for every token; of those that are not counted none that the vocabulary has.
fn labels_of_all(task: &Task, tokens: usize) -> Vec<u32> {
    let mut labels = vec![u32::MAX; tokens];
    for (&place, &class) in task.counted.iter().zip(task.classes) {
        labels[place as usize] = class;
    }
    labels
}

/// Rows of a block: blocks of one size, whole tiles of a product, and at most `most` or 8.
fn block(rows: usize, most: usize) -> usize {
    let most = most.max(8);
    let even = rows.div_ceil(rows.div_ceil(most).max(1));
    if most < TILE { even } else { even.next_multiple_of(TILE).min(most) }
}

/// The losses of a block; where gradients are needed, its logits become theirs.
fn entropy(gpu: &dyn Gpu, task: &Task, logits: &Tensor, labels: &Tensor, losses: &Tensor, first: usize) -> Result<()> {
    let _span = profile::span("cross_entropy");
    let passes = 1 + usize::from(task.needs_gradient());
    profile::moved(&[logits, logits][..passes]);
    let (rows, vocab) = logits.dims2()?;
    let grid = Grid::line(rows, if vocab >= 4096 { 1024 } else { 256 });
    let (vocab, first, grad_scale) = (vocab as u32, first as u32, task.scale * task.spec.scale);
    let dtype = logits.dtype();
    if let Some(cap) = task.spec.softcap {
        let params = kernels::CappedCrossEntropyParams { vocab, first, grad_scale, cap };
        let [gradient, loss] = [kernels::capped_cross_entropy_gradient, kernels::capped_cross_entropy_loss];
        let kernel = if task.needs_gradient() { gradient } else { loss };
        return Ok(kernel(gpu, dtype, grid, logits, labels, losses, params)?);
    }
    let params = kernels::CrossEntropyParams { vocab, first, grad_scale };
    let kernel = if task.needs_gradient() { kernels::cross_entropy_gradient } else { kernels::cross_entropy_loss };
    Ok(kernel(gpu, dtype, grid, logits, labels, losses, params)?)
}

/// Rows at their places in a tensor like `like`, zero elsewhere.
fn scattered(gpu: &dyn Gpu, x: &Tensor, places: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let y = like.zeros_like()?;
    let params = kernels::ScatterParams { width: width as u32 };
    kernels::scatter_rows(gpu, x.dtype(), Grid::line(n, 256), x, places, &y, params)?;
    Ok(y)
}
