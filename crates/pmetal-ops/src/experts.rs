//! Many small MLPs of which each token goes through a few: `y = Σ w down(act(gate(x)) * up(x))` over the experts a token was routed to.
//!
//! Tokens are sorted by expert, so that each expert sees its own as one matrix; then they are put back, weighted and summed. Llama 4 puts the
//! weight on the expert's input instead. An expert that no token goes to computes nothing, and its parameters get no gradient.

use crate::{
    Activation, Error, LinearGroup, Result, Routed, Value, gated_activation, join_rows,
    row_sums::{Lists, row_sums},
    split_columns, split_rows,
};

const OP: &str = "experts";

/// The experts of a layer.
#[derive(Clone, Debug)]
pub struct Experts {
    /// Of each expert: one projection `[2 * intermediate, hidden]`, the gate's rows first, or gate and up apart.
    pub gate_up: Vec<LinearGroup>,
    /// Of each expert: one projection `[hidden, intermediate]`.
    pub down: Vec<LinearGroup>,
}

impl Experts {
    /// Sends `x [tokens, hidden]` through the experts it was routed to and returns `[tokens, hidden]`. With `scale_input` an expert's input is
    /// multiplied by its weight, else its result is. `noise` seeds the adapters' dropout, as in [`LinearGroup::forward`].
    ///
    /// # Errors
    /// Where the routing is not for these tokens and experts, and where an expert fails.
    pub fn forward(
        &self,
        x: &Value,
        routed: &Routed,
        activation: Activation,
        scale_input: bool,
        noise: Option<u64>,
    ) -> Result<Value> {
        let (tokens, top_k) = routed.weights.tensor().dims2()?;
        if tokens != x.tensor().dim(0)? || routed.experts.len() != tokens * top_k {
            let expected = (x.tensor().dim(0)?, top_k);
            return Err(Error::operand(OP, "routing", expected, (tokens, routed.experts.len())));
        }
        let order = Order::of(&routed.experts, top_k, self.gate_up.len().min(self.down.len()))?;
        let spare = self.gate_up.iter().map(LinearGroup::spare_columns).max().unwrap_or(0);
        let rows = if scale_input {
            row_sums(x, Some(&routed.weights), Lists::gather_weighted(&order.tokens, &order.pairs), spare)?
        } else {
            row_sums(x, None, Lists::gather(&order.tokens), spare)?
        };
        let parts = split_rows(&rows, &order.counts)?;
        let of_expert = |(&expert, part): (&usize, Value)| self.expert(expert, &part, activation, noise);
        let results = order.experts.iter().zip(parts).map(of_expert).collect::<Result<Vec<_>>>()?;
        let weights = (!scale_input).then_some(&routed.weights);
        row_sums(&join_rows(&results)?, weights, Lists::sums(&order.places, top_k), 0)
    }

    fn expert(&self, expert: usize, x: &Value, activation: Activation, noise: Option<u64>) -> Result<Value> {
        let (gate_up, down) = (&self.gate_up[expert], &self.down[expert]);
        let mut projected = gate_up.forward(x, noise)?;
        if let [fused] = &projected[..] {
            let width = fused.tensor().dim(1)?;
            projected = split_columns(fused, &[width / 2, width - width / 2])?;
        }
        let [gate, up] = &projected[..] else {
            return Err(Error::operand(OP, "projections of gate and up", "1 or 2", projected.len()));
        };
        let gated = gated_activation(activation, gate, up, down.spare_columns())?;
        let mut results = down.forward(&gated, noise)?;
        match results.pop() {
            Some(y) if results.is_empty() => Ok(y),
            _ => Err(Error::operand(OP, "projections down", 1, down.members().len())),
        }
    }
}

/// The pairs of a token and one of its experts, sorted by expert; those of one expert in the order of tokens.
struct Order {
    /// Experts that somebody goes to.
    experts: Vec<usize>,
    /// How many go to each of these.
    counts: Vec<usize>,
    /// The token of each sorted row.
    tokens: Vec<u32>,
    /// The number of each sorted row's pair: `token * top_k + slot`.
    pairs: Vec<u32>,
    /// The sorted row of each pair.
    places: Vec<u32>,
}

impl Order {
    fn of(chosen: &[u32], top_k: usize, experts: usize) -> Result<Self> {
        if let Some(expert) = chosen.iter().find(|&&expert| expert as usize >= experts) {
            return Err(Error::operand(OP, "expert", format!("below {experts}"), expert));
        }
        let mut pairs: Vec<u32> = (0..chosen.len() as u32).collect();
        pairs.sort_by_key(|&pair| chosen[pair as usize]);
        let mut places = vec![0; pairs.len()];
        pairs.iter().zip(0..).for_each(|(&pair, row)| places[pair as usize] = row);
        let groups = pairs.chunk_by(|&a, &b| chosen[a as usize] == chosen[b as usize]);
        let (experts, counts) = groups.map(|group| (chosen[group[0] as usize] as usize, group.len())).unzip();
        let tokens = pairs.iter().map(|pair| pair / top_k as u32).collect();
        Ok(Self { experts, counts, tokens, pairs, places })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::{
        Adapter, Arena, LinearMember, RouterSpec, Scoring, Weight,
        autograd::composite,
        doctor::compare::{results, rounding},
        route,
        testing::{assert_close, emulated, random},
    };

    const HIDDEN: usize = 12;
    const INTERMEDIATE: usize = 8;
    const EXPERTS: usize = 5;
    const SCALE: f32 = 1.5;
    /// Of each expert: both projections with bias, `A` and `B`.
    const TENSORS: [(&str, &[usize]); 8] = [
        ("gate_up", &[2 * INTERMEDIATE, HIDDEN]),
        ("gate_up.bias", &[2 * INTERMEDIATE]),
        ("gate_up.a", &[3, HIDDEN]),
        ("gate_up.b", &[2 * INTERMEDIATE, 3]),
        ("down", &[HIDDEN, INTERMEDIATE]),
        ("down.bias", &[HIDDEN]),
        ("down.a", &[2, INTERMEDIATE]),
        ("down.b", &[HIDDEN, 2]),
    ];

    /// What is computed: operands in f64, and how tokens are routed.
    #[derive(Clone)]
    struct Case {
        /// `x`, the router's logits, the tensors of each expert.
        inputs: Vec<Tensor>,
        spec: RouterSpec,
        scale_input: bool,
    }

    impl Case {
        /// Router logits around `lean[expert]`.
        fn new(tokens: usize, top_k: usize, lean: [f64; EXPERTS], scale_input: bool) -> Self {
            let lean = Tensor::new(&lean, &Device::Cpu).unwrap();
            let logits = random(&[tokens, EXPERTS], 2).broadcast_add(&lean).unwrap();
            let mut inputs = vec![random(&[tokens, HIDDEN], 1), logits];
            let tensors = (0..EXPERTS as u64).flat_map(|e| TENSORS.iter().zip(10 * e + 3..));
            inputs.extend(tensors.map(|((_, shape), seed)| random(shape, seed)));
            let spec = RouterSpec {
                experts: EXPERTS,
                top_k,
                scoring: Scoring::Sigmoid,
                renormalise: false,
                groups: None,
                scale: 1.0,
            };
            Self { inputs, spec, scale_input }
        }

        /// All but the logits rounded to what a run computes with.
        fn rounded(&self, dtype: DType) -> Self {
            let round = |t: &Tensor| t.to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
            let mut inputs: Vec<Tensor> = self.inputs.iter().map(round).collect();
            inputs[1] = self.inputs[1].to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap();
            Self { inputs, ..self.clone() }
        }

        fn chosen(&self) -> Vec<u32> {
            route(&Value::constant(self.inputs[1].clone()), None, &self.spec).unwrap().experts
        }

        /// Every expert on every token, times zero where it was not chosen. Output, and the gradients of all inputs.
        fn reference(&self) -> (Vec<Tensor>, Vec<Tensor>) {
            let leaves: Vec<Value> = self.inputs.iter().cloned().map(Value::variable).collect();
            let (chosen, scale_input) = (self.chosen(), self.scale_input);
            let inputs = leaves.iter().collect::<Vec<_>>();
            let formula = move |t: &[Tensor]| Ok(vec![dense(t, &chosen, scale_input)?]);
            results(&leaves, |_| composite(&inputs, formula)).unwrap()
        }

        fn tensor(&self, expert: usize, name: &str) -> &Tensor {
            let place = TENSORS.iter().position(|(n, _)| *n == name).unwrap();
            &self.inputs[2 + expert * TENSORS.len() + place]
        }

        /// The experts, with those tensors in an arena that are `trained`.
        fn experts(&self, trained: fn(&str) -> bool, dtype: DType, arena_dtype: DType) -> (Experts, Arena) {
            let names = (0..EXPERTS).flat_map(|e| TENSORS.iter().map(move |(name, shape)| (e, *name, *shape)));
            let shapes = names.clone().filter(|(_, name, _)| trained(name));
            let shapes: Vec<_> = shapes.map(|(e, name, shape)| (format!("{e}.{name}"), shape.into())).collect();
            let arena = Arena::new(&shapes, arena_dtype, &Device::Cpu).unwrap();
            for (e, name, _) in names.filter(|(_, name, _)| trained(name)) {
                arena.param(&format!("{e}.{name}")).unwrap().set(self.tensor(e, name)).unwrap();
            }
            let weight = |e: usize, name: &str| match arena.param(&format!("{e}.{name}")) {
                Some(param) => Weight::Trainable(param),
                None => Weight::Frozen(self.tensor(e, name).to_dtype(dtype).unwrap()).packed().unwrap(),
            };
            let group = |e: usize, name: &str| {
                let [a, b] = ["a", "b"].map(|half| weight(e, &format!("{name}.{half}")));
                let adapter = Some(Adapter { a, b, scale: SCALE, dropout: 0.0, place: 0 });
                let bias = Some(weight(e, &format!("{name}.bias")));
                LinearGroup::new(vec![LinearMember { weight: weight(e, name), bias, adapter }]).unwrap()
            };
            let groups = |name: &str| (0..EXPERTS).map(|e| group(e, name)).collect();
            (Experts { gate_up: groups("gate_up"), down: groups("down") }, arena)
        }

        /// Output, and gradients of x and logits; those of parameters go to their arena.
        fn run(&self, experts: &Experts, dtype: DType) -> (Vec<Tensor>, Vec<Tensor>) {
            let leaves = [(0, dtype), (1, DType::F32)].map(|(i, dtype)| self.inputs[i].to_dtype(dtype).unwrap());
            let forward = |v: &[Value]| {
                let routed = route(&v[1], None, &self.spec)?;
                Ok(vec![experts.forward(&v[0], &routed, Activation::Silu, self.scale_input, None)?])
            };
            results(&leaves.map(Value::variable), forward).unwrap()
        }

        /// Against the reference, gradients of `arena` too.
        fn check(&self, trained: fn(&str) -> bool, dtype: DType, on_gpu: bool) {
            let (case, arena_dtype) = (self.rounded(dtype), if on_gpu { dtype } else { DType::F32 });
            let (want, want_grads) = case.reference();
            let (experts, arena) = case.experts(trained, dtype, arena_dtype);
            let (got, grads) = case.run(&experts, dtype);
            let (what, tolerance) = (format!("{dtype:?}, gpu {on_gpu}, {:?}", self.spec), rounding(dtype));
            assert_close(&want[0], &got[0], tolerance, &what);
            assert_close(&want_grads[0], &grads[0], tolerance, &format!("{what}: x"));
            assert_close(&want_grads[1], &grads[1], tolerance, &format!("{what}: logits"));
            let names = (0..EXPERTS).flat_map(|e| TENSORS.map(|(name, _)| format!("{e}.{name}")));
            for (name, want) in names.zip(&want_grads[2..]) {
                if let Some(param) = arena.param(&name) {
                    assert_close(want, &param.grad().unwrap(), tolerance, &format!("{what}: {name}"));
                }
            }
        }
    }

    fn dense(t: &[Tensor], chosen: &[u32], scale_input: bool) -> candle_core::Result<Tensor> {
        let (x, tokens) = (&t[0], t[0].dim(0)?);
        let scores = ((t[1].neg()?.exp()? + 1.0)?).recip()?;
        let mut y = x.zeros_like()?;
        for (e, tensors) in t[2..].chunks(TENSORS.len()).enumerate() {
            let chosen = chosen.chunks(chosen.len() / tokens).map(|of_token| f64::from(of_token.contains(&(e as u32))));
            let chosen = Tensor::from_iter(chosen, &Device::Cpu)?.unsqueeze(1)?;
            let weight = (scores.narrow(1, e, 1)? * &chosen)?;
            let (before, behind) = if scale_input { (&weight, &chosen) } else { (&chosen, &weight) };
            let linear = |x: &Tensor, t: &[Tensor]| -> candle_core::Result<Tensor> {
                let low = x.matmul(&t[2].t()?)?.matmul(&t[3].t()?)?;
                x.matmul(&t[0].t()?)?.broadcast_add(&t[1])? + (low * f64::from(SCALE))?
            };
            let gate_up = linear(&x.broadcast_mul(before)?, &tensors[..4])?;
            let gate = gate_up.narrow(1, 0, INTERMEDIATE)?;
            let gated = (&gate / (gate.neg()?.exp()? + 1.0)?)? * gate_up.narrow(1, INTERMEDIATE, INTERMEDIATE)?;
            y = (y + linear(&gated?, &tensors[4..])?.broadcast_mul(behind)?)?;
        }
        Ok(y)
    }

    const EVEN: [f64; EXPERTS] = [0.0; EXPERTS];
    /// Nobody goes to the second and the last.
    const SOME: [f64; EXPERTS] = [0.0, -9.0, 0.5, 0.0, -9.0];
    /// Everybody goes to the fourth.
    const ONE: [f64; EXPERTS] = [-9.0, -9.0, -9.0, 0.0, -9.0];

    fn adapters(name: &str) -> bool {
        name.ends_with(".a") || name.ends_with(".b")
    }

    #[test]
    fn results_and_all_gradients_are_those_of_every_expert_on_every_token() {
        for (tokens, top_k, lean) in [(7, 2, EVEN), (6, 3, SOME), (1, 2, SOME), (9, 1, ONE), (4, 5, EVEN)] {
            for (scale_input, trained) in [(false, adapters as fn(&str) -> bool), (true, adapters), (false, |_| true)] {
                let case = Case::new(tokens, top_k, lean, scale_input);
                for dtype in [DType::F32, DType::BF16] {
                    case.check(trained, dtype, false);
                    emulated(|| case.check(trained, dtype, true));
                }
            }
        }
    }

    /// What an expert learned in one step is not taken for what it learns in the next.
    #[test]
    fn experts_that_nobody_goes_to_have_no_gradient() {
        let (first, then) = (Case::new(7, 2, EVEN, false), Case::new(7, 1, ONE, false));
        let step = || {
            let (experts, arena) = first.experts(|_| true, DType::F32, DType::F32);
            first.run(&experts, DType::F32);
            assert!(arena.params().all(|p| norm(&p.grad().unwrap()) > 0.0));
            arena.clear_grads();
            then.run(&experts, DType::F32);
            let whole = arena.grads().unwrap().clone();
            let of_fourth: f32 = arena
                .params()
                .filter(|p| p.name().starts_with("3."))
                .map(|p| norm(&p.grad().unwrap()))
                .inspect(|norm| assert!(*norm > 0.0))
                .sum();
            let all = norm(&whole);
            assert!((all - of_fourth).abs() < 1e-4 * all, "{all} and {of_fourth}");
        };
        step();
        emulated(step);
    }

    fn norm(t: &Tensor) -> f32 {
        t.abs().unwrap().sum_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_routing_of_other_tokens_or_experts_is_refused() {
        let case = Case::new(4, 2, EVEN, false);
        let (mut experts, _) = case.experts(adapters, DType::F32, DType::F32);
        let value = |i: usize| Value::constant(case.inputs[i].to_dtype(DType::F32).unwrap());
        let routed = route(&value(1), None, &case.spec).unwrap();
        let forward =
            |experts: &Experts, x: &Value| experts.forward(x, &routed, Activation::Silu, false, None).map(drop);
        let fewer = Value::constant(value(0).tensor().narrow(0, 0, 3).unwrap());
        assert!(forward(&experts, &fewer).is_err());
        experts.down.truncate(1);
        assert!(forward(&experts, &value(0)).is_err());
    }
}
