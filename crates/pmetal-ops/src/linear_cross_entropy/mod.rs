//! The head and the loss in one: `loss = scale * sum_t -log softmax(logits_t)[label_t]`, with the logits of [`LogitsSpec`].
//!
//! `hidden [tokens, hidden_size]`, `W [vocab, hidden_size]`. Logits exist for one block of tokens at a time: the forward turns a block's
//! logits into its loss and at once into the gradients of `hidden` and `W`, as Liger Kernel does. The block's logits are f32.

mod cpu;
mod gpu;

use candle_core::{D, DType, Tensor};

use crate::{
    Error, LogitsSpec, Result, Value, Weight,
    autograd::{composite, is_one, one, only, recording},
    place::{Place, place, upload},
    profile,
};

const OP: &str = "linear_cross_entropy";

/// Bytes of logits that exist at a time on a GPU, roughly, unless it is said.
pub const LOGITS_BYTES: usize = 256 << 20;

/// A loss and the losses it sums.
pub struct CrossEntropy {
    /// `scale` times the sum of the tokens' losses, an f32 scalar.
    pub loss: Value,
    /// The loss of each token that is counted (nats), `[counted]` f32, on the device of the hidden states.
    pub token_losses: Tensor,
}

/// The loss of predicting `labels[t]` (negative: not counted) from `hidden[t]`.
///
/// The gradients of a trained `weight` are formed in the forward for a gradient of 1 at `loss`: make it the root of the walk back.
///
/// # Errors
/// Where shapes do not fit or a label is not below the vocabulary's size.
pub fn linear_cross_entropy(
    hidden: &Value,
    weight: &Weight,
    labels: &[i64],
    scale: f32,
    spec: LogitsSpec,
) -> Result<CrossEntropy> {
    linear_cross_entropy_within(LOGITS_BYTES, hidden, weight, labels, scale, spec)
}

/// [`linear_cross_entropy`] with about so many bytes of logits at a time, on a GPU.
///
/// # Errors
/// As there.
pub fn linear_cross_entropy_within(
    logits_bytes: usize,
    hidden: &Value,
    weight: &Weight,
    labels: &[i64],
    scale: f32,
    spec: LogitsSpec,
) -> Result<CrossEntropy> {
    let _span = profile::span(OP);
    let (tokens, width) = hidden.tensor().dims2()?;
    let (vocab, weight_width) = weight.shape().dims2()?;
    if width != weight_width || labels.len() != tokens {
        return Err(Error::operand(OP, "hidden", [labels.len(), weight_width], [tokens, width]));
    }
    if let Some(label) = labels.iter().find(|&&l| l >= vocab as i64) {
        return Err(Error::operand(OP, "label", format!("below {vocab}"), label));
    }
    let counted: Vec<u32> = (0u32..).zip(labels).filter(|&(_, &label)| label >= 0).map(|(t, _)| t).collect();
    let classes: Vec<u32> = labels.iter().filter(|&&label| label >= 0).map(|&label| label as u32).collect();
    let hidden_t = hidden.tensor().contiguous()?;
    let task = Task {
        hidden: &hidden_t,
        weight,
        counted: &counted,
        classes: &classes,
        scale,
        spec,
        logits_bytes,
        needs_hidden: hidden.requires_grad(),
        trained: weight.param().filter(|_| recording()),
    };
    let products = 1 + usize::from(task.needs_hidden) + usize::from(task.trained.is_some());
    profile::work(|| 2.0 * (products * counted.len() * vocab * width) as f64);
    let found = match place(&hidden_t, OP)? {
        Place::Cpu => cpu::run(&task)?,
        Place::Gpu(gpu) => gpu::run(&*gpu, &task)?,
        Place::Reference => return by_reference(hidden, weight, &counted, &classes, scale, spec),
    };
    let Found { loss, token_losses, dhidden } = found;
    let loss = one(Value::record_if(task.trained.is_some(), vec![loss], &[hidden], move |grads| {
        let upstream = only(grads, OP)?;
        if is_one(&upstream) {
            return Ok(vec![dhidden]);
        }
        Ok(vec![dhidden.map(|d| d.broadcast_mul(&upstream.to_dtype(d.dtype())?)).transpose()?])
    }));
    Ok(CrossEntropy { loss, token_losses })
}

/// What is to be computed.
struct Task<'a> {
    hidden: &'a Tensor,
    weight: &'a Weight,
    /// The tokens that are counted.
    counted: &'a [u32],
    /// Their labels.
    classes: &'a [u32],
    scale: f32,
    spec: LogitsSpec,
    /// Bytes of logits at a time.
    logits_bytes: usize,
    needs_hidden: bool,
    /// The parameter whose gradient is to be added to its arena.
    trained: Option<&'a crate::Param>,
}

impl Task<'_> {
    fn needs_gradient(&self) -> bool {
        self.needs_hidden || self.trained.is_some()
    }
}

/// What came of a [`Task`].
struct Found {
    loss: Tensor,
    token_losses: Tensor,
    dhidden: Option<Tensor>,
}

fn by_reference(
    hidden: &Value,
    weight: &Weight,
    counted: &[u32],
    classes: &[u32],
    scale: f32,
    spec: LogitsSpec,
) -> Result<CrossEntropy> {
    let device = hidden.tensor().device();
    let (rows, classes) = (upload(counted, device)?, upload(classes, device)?.reshape((counted.len(), 1))?);
    let token_losses = reference(hidden.tensor(), &weight.tensor()?, &rows, &classes, spec)?.to_dtype(DType::F32)?;
    let outputs = composite(&[hidden, &weight.value()?], move |t| {
        Ok(vec![(reference(&t[0], &t[1], &rows, &classes, spec)?.sum_all()? * f64::from(scale))?])
    })?;
    Ok(CrossEntropy { loss: one(outputs), token_losses })
}

/// The losses of the counted tokens in plain candle.
fn reference(
    hidden: &Tensor,
    weight: &Tensor,
    rows: &Tensor,
    classes: &Tensor,
    spec: LogitsSpec,
) -> candle_core::Result<Tensor> {
    let wide = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let hidden = hidden.to_dtype(wide)?.index_select(rows, 0)?;
    let logits = spec.of_products(&hidden.matmul(&weight.to_dtype(wide)?.t()?)?)?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let lse = (logits.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?.log()? + top)?;
    (lse - logits.gather(classes, 1)?)?.squeeze(1)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        Arena, gradients,
        testing::{assert_close, check_op, emulated, random},
    };

    const LABELS: [i64; 5] = [3, -100, 0, 10, 3];
    const SPECS: [LogitsSpec; 3] = [
        LogitsSpec { scale: 1.0, softcap: None },
        LogitsSpec { scale: 0.3, softcap: None },
        LogitsSpec { scale: 1.7, softcap: Some(1.2) },
    ];

    /// The formula for labels below 11, of which negative ones are not counted.
    fn formula(t: &[Tensor], labels: &[i64], spec: LogitsSpec) -> candle_core::Result<Vec<Tensor>> {
        let (rows, classes): (Vec<u32>, Vec<i64>) = (0..).zip(labels).filter(|(_, label)| **label >= 0).unzip();
        let classes = Tensor::new(classes, &Device::Cpu)?.reshape((rows.len(), 1))?;
        let rows = Tensor::new(rows, &Device::Cpu)?;
        Ok(vec![(reference(&t[0], &t[1], &rows, &classes, spec)?.sum_all()? * 0.25)?])
    }

    #[test]
    fn loss_and_the_gradient_of_the_hidden_states() {
        // few tokens that are not counted are computed with the others, many are left out
        let mostly: Vec<i64> = (0..17).map(|t| if t == 5 || t == 16 { -100 } else { t % 11 }).collect();
        for (labels, spec) in [LABELS.to_vec(), mostly].iter().flat_map(|labels| SPECS.map(|spec| (labels, spec))) {
            let weight = random(&[11, 6], 2);
            let (frozen, of_formula) = (weight.clone(), labels.clone());
            check_op(
                &[random(&[labels.len(), 6], 1)],
                move |t| formula(&[t[0].clone(), weight.clone()], &of_formula, spec),
                move |v| {
                    let weight = Weight::Frozen(frozen.to_dtype(DType::F32).unwrap());
                    let loss = linear_cross_entropy(&v[0], &weight, labels, 0.25, spec)?.loss;
                    // the test sends its own gradient, a multiple of 1
                    Ok(vec![loss])
                },
            );
        }
    }

    #[test]
    fn the_gradient_of_a_trained_head() {
        for spec in SPECS {
            trained(spec);
            emulated(|| trained(spec));
        }
    }

    fn trained(spec: LogitsSpec) {
        let [hidden, weight] = [random(&[5, 6], 1), random(&[11, 6], 2)];
        let leaves = [Value::variable(hidden.clone()), Value::variable(weight.clone())];
        let want = composite(&[&leaves[0], &leaves[1]], move |t| formula(t, &LABELS, spec)).unwrap();
        let dy = want[0].tensor().ones_like().unwrap();
        let want_grads = gradients(vec![(want[0].clone(), dy)], &[&leaves[0], &leaves[1]]).unwrap();

        let arena = Arena::new(&[("w".into(), weight.shape().clone())], DType::F32, &Device::Cpu).unwrap();
        let param = arena.param("w").unwrap();
        param.set(&weight.to_dtype(DType::F32).unwrap()).unwrap();
        let x = Value::constant(hidden.to_dtype(DType::F32).unwrap());
        let got = linear_cross_entropy(&x, &Weight::Trainable(param.clone()), &LABELS, 0.25, spec).unwrap();
        assert_close(want[0].tensor(), got.loss.tensor(), 1e-6, "loss");
        let loss = got.loss.tensor().to_scalar::<f32>().unwrap();
        crate::backward(got.loss).unwrap();
        assert_close(want_grads[1].as_ref().unwrap(), &param.grad().unwrap(), 1e-5, "weight gradient");
        let sum: f32 = got.token_losses.to_vec1::<f32>().unwrap().iter().sum();
        assert!((sum * 0.25 - loss).abs() < 1e-5);
        assert_eq!(got.token_losses.dims(), [4]);
    }

    #[test]
    fn a_label_outside_the_vocabulary_is_refused() {
        let weight = Weight::Frozen(random(&[11, 6], 2).to_dtype(DType::F32).unwrap());
        let x = Value::constant(random(&[1, 6], 1).to_dtype(DType::F32).unwrap());
        assert!(linear_cross_entropy(&x, &weight, &[11], 1.0, LogitsSpec::default()).is_err());
    }
}
