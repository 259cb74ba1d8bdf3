//! The norms of the residual stream.

use pmetal_ops::{Value, add_rms_norm, layer_norm, rms_norm, rms_norm_beside};

use super::parts::Named;
use crate::{NormSpec, Result};

/// A norm of the residual stream, and the columns that its reader wants free behind each row.
#[derive(Clone)]
pub(super) struct Norm {
    pub(super) weight: Named,
    pub(super) spec: NormSpec,
    pub(super) spare: usize,
}

impl Norm {
    /// The norm of `x [tokens, hidden]`.
    pub(super) fn alone(&self, x: &Value) -> Result<Value> {
        let weight = self.weight.weight.value()?;
        Ok(match self.spec {
            NormSpec::Rms(norm) => rms_norm(x, &weight, norm, self.spare)?,
            NormSpec::Layer { eps } => layer_norm(x, &weight, None, eps, x.tensor().dim(1)?)?,
        })
    }

    /// `stream` and its norm.
    pub(super) fn of(&self, stream: &Value) -> Result<(Value, Value)> {
        match self.spec {
            NormSpec::Rms(norm) => Ok(rms_norm_beside(stream, &self.weight.weight.value()?, norm, self.spare)?),
            NormSpec::Layer { .. } => Ok((stream.clone(), self.alone(stream)?)),
        }
    }

    /// `x + stream` and its norm.
    pub(super) fn of_sum(&self, x: &Value, stream: &Value) -> Result<(Value, Value)> {
        match self.spec {
            NormSpec::Rms(norm) => Ok(add_rms_norm(x, stream, &self.weight.weight.value()?, norm, self.spare)?),
            NormSpec::Layer { .. } => self.of(&sum(x, stream)?),
        }
    }

    /// This norm for a reader that wants `spare` columns.
    pub(super) fn for_reader(&self, spare: usize) -> Self {
        Self { spare, ..self.clone() }
    }
}

/// `a + b`, of one shape.
pub(super) fn sum(a: &Value, b: &Value) -> Result<Value> {
    let both = (a.tensor() + b.tensor())?;
    let recorded = Value::record(vec![both], &[a, b], |grads| {
        let grad = grads.into_iter().next().flatten();
        Ok(vec![grad.clone(), grad])
    });
    let [sum] = super::parts::take(recorded)?;
    Ok(sum)
}
