//! The group in plain candle, for devices and dtypes without a kernel.

use candle_core::{DType, Tensor};

use super::{LinearGroup, kernel::mask_seed};
use crate::{Result, Value};

/// What each member does with its operands, which follow the input in the order weight, bias, A, B.
pub(super) struct MemberPlan {
    bias: bool,
    adapter: Option<AdapterPlan>,
}

struct AdapterPlan {
    scale: f64,
    /// `[tokens, in]`: zero or `1 / (1 - dropout)`.
    mask: Option<Tensor>,
}

/// The operands as values, and how to use them.
pub(super) fn plan(group: &LinearGroup, x: &Value, noise: Option<u64>) -> Result<(Vec<Value>, Vec<MemberPlan>)> {
    let mut inputs = vec![x.clone()];
    let mut plans = Vec::with_capacity(group.members.len());
    for member in &group.members {
        inputs.push(member.weight.value()?);
        if let Some(bias) = &member.bias {
            inputs.push(bias.value()?);
        }
        let mut adapter_plan = None;
        if let Some(adapter) = &member.adapter {
            inputs.push(adapter.a.value()?);
            inputs.push(adapter.b.value()?);
            let mask = mask_seed(adapter, noise).map(|seed| mask(x.tensor(), seed, adapter.dropout)).transpose()?;
            adapter_plan = Some(AdapterPlan { scale: f64::from(adapter.scale), mask });
        }
        plans.push(MemberPlan { bias: member.bias.is_some(), adapter: adapter_plan });
    }
    Ok((inputs, plans))
}

fn mask(x: &Tensor, seed: u64, dropout: f32) -> candle_core::Result<Tensor> {
    let ones = vec![1f32; x.elem_count()];
    let mut mask = vec![0f32; ones.len()];
    pmetal_cpu::dropout(&ones, &mut mask, seed, dropout);
    Tensor::from_vec(mask, x.shape(), x.device())
}

/// The formula.
pub(super) fn run(operands: &[Tensor], plans: &[MemberPlan]) -> candle_core::Result<Vec<Tensor>> {
    let dtype = operands[0].dtype();
    // candle has no bf16 product on every device
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let mut rest = operands.iter().map(|t| t.to_dtype(wide));
    let mut next =
        || rest.next().unwrap_or_else(|| Err(candle_core::Error::Msg("linear: an operand is missing".into())));
    let x = next()?;
    let mut outputs = Vec::with_capacity(plans.len());
    for plan in plans {
        let mut y = x.matmul(&next()?.t()?)?;
        if plan.bias {
            y = y.broadcast_add(&next()?)?;
        }
        if let Some(adapter) = &plan.adapter {
            let (a, b) = (next()?, next()?);
            let x = match &adapter.mask {
                Some(mask) => (&x * mask.to_dtype(wide)?)?,
                None => x.clone(),
            };
            y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * adapter.scale)?)?;
        }
        outputs.push(y.to_dtype(dtype)?);
    }
    Ok(outputs)
}
