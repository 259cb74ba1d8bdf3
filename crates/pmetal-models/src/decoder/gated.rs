//! A gated MLP.

use pmetal_ops::{
    LinearMember, Saved, Value, Weight,
    autograd::{last, saved},
    gated_activation, split_columns,
};

use super::{
    Pass,
    parts::{LinearShape, Linears, Parts, take},
};
use crate::{GatedSpec, Result};

#[derive(Clone)]
pub(super) struct Gated {
    spec: GatedSpec,
    gate_up: Linears,
    down: Linears,
}

impl Gated {
    /// The MLP that is called `module`.
    pub(super) fn new(spec: &GatedSpec, hidden: usize, module: &str, parts: &mut Parts) -> Result<Self> {
        let (inner, bias) = (spec.intermediate_size, spec.bias);
        let part = |name: &str| format!("{module}.{name}");
        let [gate, up, both, down] = ["gate_proj", "up_proj", "gate_up_proj", "down_proj"].map(part);
        let input = |part, outputs| LinearShape { part, inputs: hidden, outputs, bias };
        let gate_up = match spec.fused {
            true => parts.linears(&[input(&both, 2 * inner)])?,
            false => parts.linears(&[input(&gate, inner), input(&up, inner)])?,
        };
        let down = parts.linears(&[LinearShape { part: &down, inputs: inner, outputs: hidden, bias }])?;
        Ok(Self { spec: spec.clone(), gate_up, down })
    }

    /// Its two groups.
    pub(super) fn groups(&self) -> [&pmetal_ops::LinearGroup; 2] {
        [self.gate_up.group(), self.down.group()]
    }

    pub(super) fn spare_columns(&self) -> usize {
        self.gate_up.spare_columns()
    }

    /// Of `x [tokens, hidden]`, of the same shape. `ends` says that nothing but the sum with the stream reads it.
    pub(super) fn forward(&self, x: &Value, pass: &Pass, ends: bool) -> Result<Value> {
        let gates = saved(Saved::Gates, || self.gate_up.forward(x, pass.noise))?;
        let [gate, up] = match self.spec.fused {
            false => take(gates)?,
            true => {
                let [joint] = take(gates)?;
                take(split_columns(&joint, &[self.spec.intermediate_size; 2])?)?
            }
        };
        let gated = gated_activation(self.spec.activation, &gate, &up, self.down.spare_columns())?;
        let down = || self.down.forward(&gated, pass.noise);
        let [y] = take(if ends { last(down) } else { down() }?)?;
        Ok(y)
    }

    pub(super) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        self.gate_up.for_each(f)?;
        self.down.for_each(f)
    }

    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        self.gate_up.named_weights(to);
        self.down.named_weights(to);
    }
}
