//! The head and the loss in one: `loss = scale * sum_t -log softmax(hidden_t Wᵀ)[label_t]`.
//!
//! `hidden [tokens, hidden_size]`, `W [vocab, hidden_size]`. Logits exist for one block of tokens at a time: the forward turns a block's
//! logits into its loss and at once into the gradients of `hidden` and `W`, as Liger Kernel does. The block's logits are f32.

use candle_core::{D, DType, Device, Tensor};
use pmetal_cpu::{Mat, cross_entropy_losses, cross_entropy_rows, matmul};

use crate::{
    Error, Result, Value, Weight,
    autograd::{composite, one, only, recording},
    kernel::{CpuElement, View, for_dtype, has_cpu_kernel, room, tensor},
};

const OP: &str = "linear_cross_entropy";

/// Bytes of logits that exist at a time, roughly.
const BLOCK_BYTES: usize = 16 << 20;

/// A loss and the losses it sums.
pub struct CrossEntropy {
    /// `scale` times the sum of the tokens' losses, an f32 scalar.
    pub loss: Value,
    /// The loss of each token (nats), 0 where its label is negative.
    pub token_losses: Vec<f32>,
}

/// The loss of predicting `labels[t]` (negative: not counted) from `hidden[t]`.
///
/// The gradients of a trained `weight` are formed in the forward for a gradient of 1 at `loss`: make it the root of the walk back.
///
/// # Errors
/// Where shapes do not fit or a label is not below the vocabulary's size.
pub fn linear_cross_entropy(hidden: &Value, weight: &Weight, labels: &[i64], scale: f32) -> Result<CrossEntropy> {
    let (tokens, width) = hidden.tensor().dims2()?;
    let (vocab, weight_width) = weight.shape().dims2()?;
    if width != weight_width || labels.len() != tokens {
        return Err(Error::operand(OP, "hidden", [labels.len(), weight_width], [tokens, width]));
    }
    if let Some(label) = labels.iter().find(|&&l| l >= vocab as i64) {
        return Err(Error::operand(OP, "label", format!("below {vocab}"), label));
    }
    if !has_cpu_kernel(hidden.tensor()) {
        return by_reference(hidden, weight, labels, scale);
    }
    let hidden_t = hidden.tensor().contiguous()?;
    let needs = Needs { hidden: hidden.requires_grad(), weight: weight.param().is_some() && recording() };
    let (token_losses, dhidden) = blocks(&hidden_t, weight, labels, scale, &needs)?;
    let sum: f64 = token_losses.iter().map(|&l| f64::from(l)).sum();
    let loss = Tensor::new((sum * f64::from(scale)) as f32, &Device::Cpu)?;
    let loss = one(Value::record_if(needs.weight, vec![loss], &[hidden], move |grads| {
        let upstream = only(grads, OP)?.to_scalar::<f32>()?;
        let dhidden = match dhidden {
            Some(d) if upstream != 1.0 => Some((d * f64::from(upstream))?),
            other => other,
        };
        Ok(vec![dhidden])
    }));
    Ok(CrossEntropy { loss, token_losses })
}

struct Needs {
    hidden: bool,
    weight: bool,
}

fn blocks(
    hidden: &Tensor,
    weight: &Weight,
    labels: &[i64],
    scale: f32,
    needs: &Needs,
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let (hv, wv) = (View::of_tensor(hidden, OP)?, weight.view()?);
    let (vocab, width) = weight.shape().dims2()?;
    for_dtype!(OP, hidden.dtype(), T => for_dtype!(OP, wv.dtype(), W => {
        let run = Blocks { hidden: hv.slice::<T>()?, weight: wv.slice::<W>()?, width, vocab, scale };
        let (losses, dhidden) = run.all(labels, needs, weight)?;
        Ok((losses, dhidden.map(|d| tensor(d, hidden.shape().clone())).transpose()?))
    }))
}

struct Blocks<'a, T, W> {
    hidden: &'a [T],
    weight: &'a [W],
    width: usize,
    vocab: usize,
    scale: f32,
}

impl<T: CpuElement, W: CpuElement> Blocks<'_, T, W> {
    /// The tokens' losses, and the gradient of `hidden` where it is needed; that of a trained weight goes to its arena.
    fn all(&self, labels: &[i64], needs: &Needs, weight: &Weight) -> Result<(Vec<f32>, Option<Vec<T>>)> {
        let counted: Vec<usize> = (0..labels.len()).filter(|&t| labels[t] >= 0).collect();
        let rows_per_block = (BLOCK_BYTES / (4 * self.vocab)).clamp(8, 1024);
        let mut losses = vec![0f32; labels.len()];
        let mut dhidden = needs.hidden.then(|| room::<T>(self.hidden.len()));
        let mut logits = vec![0f32; rows_per_block.min(counted.len()) * self.vocab];
        let mut hidden = room::<T>(rows_per_block.min(counted.len()) * self.width);
        let mut gradient = if needs.hidden { room::<T>(hidden.len()) } else { Vec::new() };
        for block in counted.chunks(rows_per_block) {
            let n = block.len();
            let hidden = &mut hidden[..n * self.width];
            self.gather(block, hidden);
            let labels: Vec<i64> = block.iter().map(|&t| labels[t]).collect();
            let logits = &mut logits[..n * self.vocab];
            matmul(logits, self.vocab, Mat::new(hidden, n, self.width), self.head().t(), 1.0, 0.0);
            let mut block_losses = vec![0f32; n];
            if needs.hidden || needs.weight {
                cross_entropy_rows(logits, self.vocab, &labels, self.scale, &mut block_losses);
            } else {
                cross_entropy_losses(logits, self.vocab, &labels, &mut block_losses);
            }
            if let Some(dhidden) = &mut dhidden {
                let gradient = &mut gradient[..n * self.width];
                matmul(gradient, self.width, Mat::new(logits, n, self.vocab), self.head(), 1.0, 0.0);
                for (&t, row) in block.iter().zip(gradient.chunks_exact(self.width)) {
                    dhidden[t * self.width..][..self.width].copy_from_slice(row);
                }
            }
            if let Some(param) = weight.param().filter(|_| needs.weight) {
                let dlogits = Mat::new(&*logits, n, self.vocab);
                param.accumulate_grad(|g| {
                    matmul(g, self.width, dlogits.t(), Mat::new(hidden, n, self.width), 1.0, 1.0)
                })?;
            }
            for (&t, loss) in block.iter().zip(block_losses) {
                losses[t] = loss;
            }
        }
        Ok((losses, dhidden))
    }

    fn head(&self) -> Mat<'_, W> {
        Mat::new(self.weight, self.vocab, self.width)
    }

    fn gather(&self, tokens: &[usize], into: &mut [T]) {
        for (&t, row) in tokens.iter().zip(into.chunks_exact_mut(self.width)) {
            row.copy_from_slice(&self.hidden[t * self.width..][..self.width]);
        }
    }
}

fn by_reference(hidden: &Value, weight: &Weight, labels: &[i64], scale: f32) -> Result<CrossEntropy> {
    let device = hidden.tensor().device().clone();
    let counted: Vec<u32> = (0..labels.len() as u32).filter(|&t| labels[t as usize] >= 0).collect();
    let picked: Vec<i64> = labels.iter().copied().filter(|&l| l >= 0).collect();
    let rows = Tensor::new(counted.as_slice(), &device)?;
    let classes = Tensor::from_vec(picked, (counted.len(), 1), &device)?;
    let mut token_losses = vec![0f32; labels.len()];
    let values =
        reference(hidden.tensor(), &weight.tensor()?, &rows, &classes)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    for (&t, loss) in counted.iter().zip(values) {
        token_losses[t as usize] = loss;
    }
    let outputs = composite(&[hidden, &weight.value()?], move |t| {
        Ok(vec![(reference(&t[0], &t[1], &rows, &classes)?.sum_all()? * f64::from(scale))?])
    })?;
    Ok(CrossEntropy { loss: one(outputs), token_losses })
}

/// The losses of the counted tokens in plain candle.
fn reference(hidden: &Tensor, weight: &Tensor, rows: &Tensor, classes: &Tensor) -> candle_core::Result<Tensor> {
    let wide = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let hidden = hidden.to_dtype(wide)?.index_select(rows, 0)?;
    let logits = hidden.matmul(&weight.to_dtype(wide)?.t()?)?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let lse = (logits.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?.log()? + top)?;
    (lse - logits.gather(classes, 1)?)?.squeeze(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Arena, gradients,
        testing::{assert_close, check_op, random},
    };

    const LABELS: [i64; 5] = [3, -100, 0, 10, 3];

    fn formula(t: &[Tensor]) -> candle_core::Result<Vec<Tensor>> {
        let rows = Tensor::new(&[0u32, 2, 3, 4], &Device::Cpu)?;
        let classes = Tensor::new(&[[3i64], [0], [10], [3]], &Device::Cpu)?;
        Ok(vec![(reference(&t[0], &t[1], &rows, &classes)?.sum_all()? * 0.25)?])
    }

    #[test]
    fn loss_and_the_gradient_of_the_hidden_states() {
        let weight = random(&[11, 6], 2);
        let frozen = weight.clone();
        check_op(
            &[random(&[5, 6], 1)],
            move |t| formula(&[t[0].clone(), weight.clone()]),
            move |v| {
                let weight = Weight::Frozen(frozen.to_dtype(DType::F32).unwrap());
                let loss = linear_cross_entropy(&v[0], &weight, &LABELS, 0.25)?.loss;
                // the test sends its own gradient, a multiple of 1
                Ok(vec![loss])
            },
        );
    }

    #[test]
    fn the_gradient_of_a_trained_head() {
        let [hidden, weight] = [random(&[5, 6], 1), random(&[11, 6], 2)];
        let leaves = [Value::variable(hidden.clone()), Value::variable(weight.clone())];
        let want = composite(&[&leaves[0], &leaves[1]], formula).unwrap();
        let dy = want[0].tensor().ones_like().unwrap();
        let want_grads = gradients(vec![(want[0].clone(), dy)], &[&leaves[0], &leaves[1]]).unwrap();

        let arena = Arena::new(&[("w".into(), weight.shape().clone())], DType::F32, &Device::Cpu).unwrap();
        let param = arena.param("w").unwrap();
        param.set(&weight.to_dtype(DType::F32).unwrap()).unwrap();
        let x = Value::constant(hidden.to_dtype(DType::F32).unwrap());
        let got = linear_cross_entropy(&x, &Weight::Trainable(param.clone()), &LABELS, 0.25).unwrap();
        assert_close(want[0].tensor(), got.loss.tensor(), 1e-6, "loss");
        crate::backward(got.loss).unwrap();
        assert_close(want_grads[1].as_ref().unwrap(), &param.grad().unwrap(), 1e-5, "weight gradient");
        assert_eq!(got.token_losses[1], 0.0);
    }

    #[test]
    fn a_label_outside_the_vocabulary_is_refused() {
        let weight = Weight::Frozen(random(&[11, 6], 2).to_dtype(DType::F32).unwrap());
        let x = Value::constant(random(&[1, 6], 1).to_dtype(DType::F32).unwrap());
        assert!(linear_cross_entropy(&x, &weight, &[11], 1.0).is_err());
    }
}
