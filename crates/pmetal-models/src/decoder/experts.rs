//! Experts, their router, and an MLP beside them.

use pmetal_ops::{Experts as Grouped, LinearMember, Value, Weight, route};

use super::{
    gated::Gated,
    norm::sum,
    parts::{LinearShape, Linears, Named, Parts, take},
    pass::Pass,
};
use crate::{ExpertsSpec, Result, RouterBias};

#[derive(Clone)]
pub(super) struct Experts {
    spec: ExpertsSpec,
    router: Linears,
    selection: Option<Named>,
    experts: Grouped,
    /// The modules of the experts' matrices: of gate and up, of down.
    modules: [Vec<String>; 2],
    shared: Option<Gated>,
}

impl Experts {
    pub(super) fn new(spec: &ExpertsSpec, hidden: usize, parts: &mut Parts) -> Result<Self> {
        let count = spec.router.experts;
        let bias = spec.router_bias == RouterBias::Logits;
        let router = parts.linears(&[LinearShape { part: "mlp.gate", inputs: hidden, outputs: count, bias }])?;
        let selection = match spec.router_bias {
            RouterBias::Selection => Some(parts.weight("mlp.gate.e_score_correction_bias", count)?),
            RouterBias::Absent | RouterBias::Logits => None,
        };
        let (inner, bias) = (spec.expert.intermediate_size, spec.expert.bias);
        let mut each = |name: &str, inputs, outputs| {
            let groups = (0..count).map(|expert| {
                let part = format!("mlp.experts.{expert}.{name}");
                Ok(parts.linears(&[LinearShape { part: &part, inputs, outputs, bias }])?.into_parts())
            });
            Ok::<_, crate::Error>(groups.collect::<Result<Vec<_>>>()?.into_iter().unzip())
        };
        let (gate_up, gate_up_modules) = each("gate_up_proj", hidden, 2 * inner)?;
        let (down, down_modules) = each("down_proj", inner, hidden)?;
        let shared = match &spec.shared {
            Some(shared) => Some(Gated::new(shared, hidden, "mlp.shared_experts", parts)?),
            None => None,
        };
        let modules = [gate_up_modules, down_modules].map(|modules: Vec<Vec<String>>| modules.concat());
        Ok(Self { spec: spec.clone(), router, selection, experts: Grouped { gate_up, down }, modules, shared })
    }

    /// Of `x [tokens, hidden]`, of the same shape, and the router's products `[tokens, experts]`.
    pub(super) fn forward(&self, x: &Value, pass: &Pass) -> Result<[Value; 2]> {
        let [logits] = take(self.router.forward(x, pass.noise)?)?;
        let bias = self.selection.as_ref().map(|bias| bias.weight.tensor()).transpose()?;
        let routed = route(&logits, bias.as_ref(), &self.spec.router)?;
        let ExpertsSpec { expert, scale_input, .. } = &self.spec;
        let y = self.experts.forward(x, &routed, expert.activation, *scale_input, pass.noise)?;
        let y = match &self.shared {
            Some(shared) => sum(&y, &shared.forward(x, pass, false)?)?,
            None => y,
        };
        Ok([y, logits])
    }

    pub(super) fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        let [gate_up, down] = &self.modules;
        let groups = self.experts.gate_up.iter_mut().zip(gate_up).chain(self.experts.down.iter_mut().zip(down));
        for (group, module) in groups {
            group.change(|members| members.iter_mut().for_each(|member| f(module, member)))?;
        }
        self.shared.iter_mut().try_for_each(|shared| shared.for_each_linear(f))
    }

    pub(super) fn named_weights(&self, to: &mut Vec<(String, Weight)>) {
        self.router.named_weights(to);
        to.extend(self.selection.iter().map(Named::pair));
        let [gate_up, down] = &self.modules;
        for (group, module) in self.experts.gate_up.iter().zip(gate_up).chain(self.experts.down.iter().zip(down)) {
            for member in group.members() {
                to.push((format!("{module}.weight"), member.weight.clone()));
                to.extend(member.bias.iter().map(|bias| (format!("{module}.bias"), bias.clone())));
            }
        }
        self.shared.iter().for_each(|shared| shared.named_weights(to));
    }
}
