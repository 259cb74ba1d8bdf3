//! The head alone: `logits = softcap(scale * hidden Wᵀ)`, in f32 whatever the activations are.

use candle_core::{DType, Tensor};
use pmetal_cpu::{Arithmetic, FewRows, Left, MAX_ROWS, Mat, few_rows, multiply, softcap};
use pmetal_metal::empty;

use crate::{
    Result, Weight,
    kernel::{View, for_dtype, room, tensor},
    linear::product,
    place::{Place, place},
    profile,
};

const OP: &str = "logits";

/// What becomes of the products of hidden states with the head: `softcap(scale * products)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitsSpec {
    /// A factor of all logits.
    pub scale: f32,
    /// The bound of a logit's size, where there is one: `cap * tanh(x / cap)` (Gemma Team, "Gemma 2", 2024).
    pub softcap: Option<f32>,
}

impl Default for LogitsSpec {
    fn default() -> Self {
        Self { scale: 1.0, softcap: None }
    }
}

impl LogitsSpec {
    /// The formula in plain candle.
    pub(crate) fn of_products(self, products: &Tensor) -> candle_core::Result<Tensor> {
        let scale = f64::from(self.scale);
        let Some(cap) = self.softcap.map(f64::from) else {
            return if self.scale == 1.0 { Ok(products.clone()) } else { products * scale };
        };
        (products * (scale / cap))?.tanh()? * cap
    }
}

/// The logits of `hidden [n, hidden_size]` under `weight [vocab, hidden_size]`: `[n, vocab]` f32. No gradient is recorded.
pub fn logits(hidden: &Tensor, weight: &Weight, spec: LogitsSpec) -> Result<Tensor> {
    let _span = profile::span(OP);
    profile::work(|| 2.0 * (hidden.elem_count() * weight.shape().dims().first().copied().unwrap_or(0)) as f64);
    profile::traffic(|| weight.size_in_bytes() as f64);
    match place(hidden, OP)? {
        Place::Cpu => on_cpu(&hidden.contiguous()?, weight, spec),
        Place::Gpu(gpu) => {
            let (hidden, weight) = (hidden.contiguous()?, weight.tensor_in(hidden.dtype())?);
            let logits = empty((hidden.dim(0)?, weight.dim(0)?), DType::F32, hidden.device())?;
            product(&*gpu, &hidden, &weight, true, &logits, spec.scale, 0.0)?;
            Ok(LogitsSpec { scale: 1.0, ..spec }.of_products(&logits)?)
        }
        Place::Reference => {
            Ok(spec.of_products(&hidden.to_dtype(DType::F32)?.matmul(&weight.tensor_in(DType::F32)?.t()?)?)?)
        }
    }
}

/// The hidden states are multiplied in their own dtype: the sums are f32 and stay it.
fn on_cpu(hidden: &Tensor, weight: &Weight, spec: LogitsSpec) -> Result<Tensor> {
    let ((rows, width), vocab) = (hidden.dims2()?, weight.shape().dims2()?.0);
    let (view, weight) = (View::of_tensor(hidden, OP)?, weight.view()?);
    let right = weight.right(vocab, width, true)?;
    let mut logits = room::<f32>(rows * vocab);
    for_dtype!(OP, hidden.dtype(), T => {
        let x = Mat::new(view.slice::<T>()?, rows, width);
        if rows <= MAX_ROWS {
            few_rows(x, &mut [FewRows { c: &mut logits, c_row_stride: vocab, right, low_rank: None }], spec.scale, 0.0);
        } else {
            multiply(&mut logits, vocab, &[(&Left::new(x, Arithmetic::of::<T>()), right)], spec.scale, 0.0);
        }
        Ok(())
    })?;
    if let Some(cap) = spec.softcap {
        softcap(&mut logits, cap);
    }
    tensor(logits, (rows, vocab))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, emulated, random};

    #[test]
    fn logits_of_bf16_states_are_f32() {
        for (rows, width) in [(1, 10), (3, 11), (20, 10)] {
            let (hidden, head) = (random(&[rows, width], 1), random(&[17, width], 2));
            let [hidden, head] = [hidden, head].map(|t| t.to_dtype(DType::BF16).unwrap());
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let want = wide(&hidden).matmul(&wide(&head).t().unwrap()).unwrap();
            for head in [Weight::Frozen(head.clone()), Weight::Frozen(head).packed().unwrap()] {
                let run = |spec| logits(&hidden, &head, spec).unwrap();
                let got = run(LogitsSpec::default());
                assert_eq!(got.dtype(), DType::F32);
                assert_close(&want, &got, 1e-6, "logits");
                assert_close(&(&want * 0.25).unwrap(), &run(LogitsSpec { scale: 0.25, softcap: None }), 1e-6, "scaled");
                let capped = (((&want * (1.7 / 1.2)).unwrap().tanh().unwrap()) * 1.2).unwrap();
                let spec = LogitsSpec { scale: 1.7, softcap: Some(1.2) };
                for got in [run(spec), emulated(|| run(spec))] {
                    assert_close(&capped, &got, 1e-6, "capped");
                }
            }
        }
    }
}
