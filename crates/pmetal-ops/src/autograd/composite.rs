use candle_core::{DType, Tensor, Var};

use super::Value;
use crate::Result;

/// Runs a sub-graph written in plain candle operations; backward runs it again on candle variables and takes candle's gradient of
/// `sum(y * dy)`.
///
/// Every trainable tensor must be among `inputs`, and our own operations must not occur inside. For whatever is not on the hot path, for
/// devices and dtypes without a kernel, and as the oracle of hand-written backwards.
pub fn composite(
    inputs: &[&Value],
    f: impl Fn(&[Tensor]) -> candle_core::Result<Vec<Tensor>> + Send + 'static,
) -> Result<Vec<Value>> {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.tensor().detach()).collect();
    let outputs = f(&tensors)?;
    let needs: Vec<bool> = inputs.iter().map(|v| v.requires_grad()).collect();
    Ok(Value::record(outputs, inputs, move |grads| {
        let vars = tensors
            .iter()
            .zip(&needs)
            .map(|(t, &need)| if need { Var::from_tensor(t).map(Some) } else { Ok(None) })
            .collect::<candle_core::Result<Vec<_>>>()?;
        let leaves: Vec<Tensor> = vars
            .iter()
            .zip(&tensors)
            .map(|(v, t)| v.as_ref().map_or_else(|| t.clone(), |v| v.as_tensor().clone()))
            .collect();
        let outputs = f(&leaves)?;
        let mut total: Option<Tensor> = None;
        for (y, dy) in outputs.iter().zip(grads) {
            let Some(dy) = dy else { continue };
            let term = (y * dy.to_dtype(y.dtype())?)?.sum_all()?.to_dtype(wide(y.dtype()))?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        let Some(total) = total else { return Ok(vec![None; leaves.len()]) };
        let store = total.backward()?;
        Ok(vars.iter().map(|v| v.as_ref().and_then(|v| store.get(v.as_tensor()).cloned())).collect())
    }))
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
