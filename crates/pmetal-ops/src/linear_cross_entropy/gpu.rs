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

pub(super) fn run(gpu: &dyn Gpu, task: &Task) -> Result<Found> {
    let (hidden, device, dtype) = (task.hidden, task.hidden.device(), task.hidden.dtype());
    let (tokens, width) = hidden.dims2()?;
    let vocab = task.weight.shape().dim(0)?;
    let n = task.counted.len();
    let token_losses = Tensor::zeros(n, DType::F32, device)?;
    let loss = empty(1, DType::F32, device)?;
    let mut dhidden = None;
    if n > 0 {
        let head = task.weight.tensor_in(dtype)?;
        let (places, labels) = (upload(task.counted, device)?, upload(task.classes, device)?);
        // every token is counted: blocks are ranges of what is there
        let all = n == tokens;
        let rows = if all { hidden.clone() } else { gather_on_gpu(gpu, &places, hidden)? };
        let drows = task.needs_hidden.then(|| empty((n, width), dtype, device)).transpose()?;
        let most = (task.logits_bytes / (dtype.size_in_bytes() * vocab)).clamp(8, n.max(8));
        let logits = empty((most.min(n), vocab), dtype, device)?;
        for first in (0..n).step_by(most) {
            let len = most.min(n - first);
            let (x, logits) = (rows.narrow(0, first, len)?, logits.narrow(0, 0, len)?);
            let labels = labels.narrow(0, first, len)?;
            product(gpu, &x, &head, true, &logits, 1.0, 0.0)?;
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
    Ok(Found { loss: loss.reshape(())?, token_losses, dhidden })
}

/// The losses of a block; where gradients are needed, its logits become theirs.
fn entropy(gpu: &dyn Gpu, task: &Task, logits: &Tensor, labels: &Tensor, losses: &Tensor, first: usize) -> Result<()> {
    let _span = profile::span("cross_entropy");
    let passes = 1 + usize::from(task.needs_gradient());
    profile::moved(&[logits, logits][..passes]);
    let (rows, vocab) = logits.dims2()?;
    let grid = Grid::line(rows, if vocab >= 4096 { 1024 } else { 256 });
    let params = kernels::CrossEntropyParams { vocab: vocab as u32, first: first as u32, grad_scale: task.scale };
    let kernel = if task.needs_gradient() { kernels::cross_entropy_gradient } else { kernels::cross_entropy_loss };
    Ok(kernel(gpu, logits.dtype(), grid, logits, labels, losses, params)?)
}

/// Rows at their places in a tensor like `like`, zero elsewhere.
fn scattered(gpu: &dyn Gpu, x: &Tensor, places: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let y = like.zeros_like()?;
    let params = kernels::ScatterParams { width: width as u32 };
    kernels::scatter_rows(gpu, x.dtype(), Grid::line(n, 256), x, places, &y, params)?;
    Ok(y)
}
