//! The head alone: `logits = hidden Wᵀ`, in f32 whatever the activations are.

use candle_core::{DType, Tensor};
use pmetal_metal::empty;

use crate::{
    LinearGroup, LinearMember, Result, Value, Weight,
    linear::product,
    no_grad,
    place::{Place, place},
};

/// The logits of `hidden [n, hidden_size]` under `weight [vocab, hidden_size]`: `[n, vocab]` f32. No gradient is recorded.
pub fn logits(hidden: &Tensor, weight: &Weight) -> Result<Tensor> {
    if let Place::Gpu(gpu) = place(hidden, "logits")? {
        let (hidden, weight) = (hidden.contiguous()?, weight.tensor_in(hidden.dtype())?);
        let logits = empty((hidden.dim(0)?, weight.dim(0)?), DType::F32, hidden.device())?;
        product(&*gpu, &hidden, &weight, true, &logits, 1.0, 0.0)?;
        return Ok(logits);
    }
    // a product's result has its input's dtype
    let hidden = Value::constant(hidden.to_dtype(DType::F32)?);
    let head = LinearMember { weight: weight.clone(), bias: None, adapter: None };
    let logits = no_grad(|| LinearGroup { members: vec![head] }.forward(&hidden, None))?;
    Ok(crate::autograd::one(logits).tensor().clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random};

    #[test]
    fn logits_of_bf16_states_are_f32() {
        let (hidden, head) = (random(&[3, 10], 1), random(&[17, 10], 2));
        let [hidden, head] = [hidden, head].map(|t| t.to_dtype(DType::BF16).unwrap());
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let want = wide(&hidden).matmul(&wide(&head).t().unwrap()).unwrap();
        let got = logits(&hidden, &Weight::Frozen(head)).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        assert_close(&want, &got, 1e-6, "logits");
    }
}
