//! Which experts a token goes to, and how much each counts; and the loss that keeps experts equally busy.
//!
//! Scores are `softmax(logits)` or `sigmoid(logits)`. A token goes to the `top_k` experts of the largest scores, ties to the lower number; with a
//! bias of the experts, to those of the largest `score + bias`, and with groups only to experts of the groups that are kept: those whose two
//! best add up to the most. An expert's weight is its plain score, renormalised where asked for (after a softmax that is the softmax over the
//! chosen alone), then times `scale`. The choice itself has no gradient; it is made on the host, which has to know it.
//!
//! Sources: Shazeer et al., "Outrageously large neural networks", 2017; Fedus et al., "Switch transformers", 2021 (the loss); DeepSeek-AI,
//! "DeepSeek-V3 technical report", 2024 (bias and groups). A small part of a layer: in plain candle operations on every device.

use std::cmp::Ordering;

use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

use crate::{
    Error, Result, Value,
    autograd::{composite, one},
    profile,
};

const OP: &str = "route";

/// How scores come out of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Shares of one.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
}

/// Experts in groups of equal size, as they are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many there are.
    pub count: usize,
    /// How many of them a token may choose from.
    pub kept: usize,
}

/// What is constant over the tokens of a router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterSpec {
    /// How many experts there are.
    pub experts: usize,
    /// How many of them a token goes to.
    pub top_k: usize,
    /// How scores come out of logits.
    pub scoring: Scoring,
    /// Whether a token's weights add up to one, before `scale`.
    pub renormalise: bool,
    /// Groups that are chosen first, where there are any.
    pub groups: Option<Groups>,
    /// Factor of the weights.
    pub scale: f64,
}

/// Where tokens go.
#[derive(Clone)]
pub struct Routed {
    /// The experts of each token, `tokens * top_k`, the best first.
    pub experts: Vec<u32>,
    /// Their weights, `[tokens, top_k]` f32 (f64 of logits in f64).
    pub weights: Value,
}

/// Chooses experts by `logits [tokens, experts]`, and by `bias [experts]` where there is one.
///
/// # Errors
/// Where the operands do not fit the spec, or the spec itself.
pub fn route(logits: &Value, bias: Option<&Tensor>, spec: &RouterSpec) -> Result<Routed> {
    let _span = profile::span(OP);
    spec.check()?;
    let (tokens, experts) = logits.tensor().dims2()?;
    if experts != spec.experts {
        return Err(Error::operand(OP, "width of logits", spec.experts, experts));
    }
    if let Some(bias) = bias.filter(|bias| bias.dims() != [experts]) {
        return Err(Error::operand(OP, "bias", [experts], bias.dims()));
    }
    let ranks = spec.ranks(&on_host(logits.tensor())?, bias.map(on_host).transpose()?.as_deref());
    let chosen: Vec<u32> = ranks.par_chunks_exact(experts).flat_map_iter(|ranks| spec.choose(ranks)).collect();
    let (spec, chosen_t) = (*spec, Tensor::from_slice(&chosen, (tokens, spec.top_k), logits.tensor().device())?);
    let weights = one(composite(&[logits], move |t| Ok(vec![spec.weights(&t[0], &chosen_t)?]))?);
    Ok(Routed { experts: chosen, weights })
}

/// `experts * Σ_e (choices of e / rows) * (Σ softmax(logits)_e / rows)` over the rows of all layers' `logits [tokens, experts]`: least where all
/// experts are equally busy. A scalar, f32 (f64 of logits in f64). Choices are those of the largest logits, whatever the spec's scoring.
///
/// # Errors
/// Where there are no logits, or they do not fit the spec.
pub fn router_loss(logits: &[Value], spec: &RouterSpec) -> Result<Value> {
    let _span = profile::span("router_loss");
    spec.check()?;
    let plain = RouterSpec { groups: None, ..*spec };
    let (mut rows, mut counts) = (0, vec![0f64; spec.experts]);
    for layer in logits {
        let (tokens, experts) = layer.tensor().dims2()?;
        if experts != spec.experts {
            return Err(Error::operand("router_loss", "width of logits", spec.experts, experts));
        }
        rows += tokens;
        for expert in on_host(layer.tensor())?.chunks_exact(experts).flat_map(|logits| plain.choose(logits)) {
            counts[expert as usize] += 1.0;
        }
    }
    if rows == 0 {
        return Err(Error::operand("router_loss", "number of rows", "at least 1", 0));
    }
    let factor = spec.experts as f64 / (rows as f64 * rows as f64);
    let factors: Vec<f64> = counts.iter().map(|count| count * factor).collect();
    let inputs: Vec<&Value> = logits.iter().collect();
    Ok(one(composite(&inputs, move |t| {
        let dtype = wide(&t[0]);
        let factors = Tensor::from_slice(&factors, factors.len(), &Device::Cpu)?.to_dtype(dtype)?;
        let factors = factors.to_device(t[0].device())?;
        let mut shares = Tensor::zeros(factors.dims(), dtype, t[0].device())?;
        for logits in t {
            shares = (shares + softmax(&logits.to_dtype(dtype)?)?.sum(0)?)?;
        }
        Ok(vec![(shares * factors)?.sum_all()?])
    })?))
}

impl RouterSpec {
    fn check(&self) -> Result<()> {
        let Groups { count, kept } = self.groups.unwrap_or(Groups { count: 1, kept: 1 });
        let whole = count > 0 && self.experts.is_multiple_of(count) && (1..=count).contains(&kept);
        if !whole {
            let expected = format!("groups of equal size of {} experts, one kept at least", self.experts);
            return Err(Error::operand(OP, "groups", expected, (count, kept)));
        }
        let most = self.experts / count * kept;
        if (1..=most).contains(&self.top_k) {
            return Ok(());
        }
        Err(Error::operand(OP, "experts of a token", format!("1 to {most}"), self.top_k))
    }

    /// What experts are chosen by, `tokens * experts`. Without bias or groups the logits have the order of the scores.
    fn ranks(&self, logits: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let mut ranks = logits.to_vec();
        if bias.is_none() && self.groups.is_none() {
            return ranks;
        }
        for scores in ranks.chunks_exact_mut(self.experts) {
            match self.scoring {
                Scoring::Sigmoid => scores.iter_mut().for_each(|score| *score = 1.0 / (1.0 + (-*score).exp())),
                Scoring::Softmax => {
                    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    scores.iter_mut().for_each(|score| *score = (*score - most).exp());
                    let sum: f32 = scores.iter().sum();
                    scores.iter_mut().for_each(|score| *score /= sum);
                }
            }
            scores.iter_mut().zip(bias.unwrap_or_default()).for_each(|(score, bias)| *score += bias);
        }
        ranks
    }

    /// The experts of one token, the best first.
    fn choose(&self, ranks: &[f32]) -> Vec<u32> {
        let Some(Groups { count, kept }) = self.groups else {
            return largest(ranks.iter().copied().zip(0..), self.top_k);
        };
        let size = self.experts / count;
        let two_best = |ranks: &[f32]| -> f32 {
            largest(ranks.iter().copied().zip(0..), 2).iter().map(|&i| ranks[i as usize]).sum()
        };
        let groups = largest(ranks.chunks_exact(size).map(two_best).zip(0..), kept);
        let mut allowed: Vec<u32> =
            groups.iter().flat_map(|group| group * size as u32..(group + 1) * size as u32).collect();
        // ties go to the lower number
        allowed.sort_unstable();
        largest(allowed.into_iter().map(|expert| (ranks[expert as usize], expert)), self.top_k)
    }

    /// The weights of the experts `chosen [tokens, top_k]`, in plain candle.
    fn weights(&self, logits: &Tensor, chosen: &Tensor) -> candle_core::Result<Tensor> {
        let logits = logits.to_dtype(wide(logits))?;
        let weights = match (self.scoring, self.renormalise) {
            (Scoring::Softmax, true) => softmax(&logits.gather(chosen, 1)?)?,
            (Scoring::Softmax, false) => softmax(&logits)?.gather(chosen, 1)?,
            (Scoring::Sigmoid, renormalise) => {
                let scores = ((logits.gather(chosen, 1)?.neg()?.exp()? + 1.0)?).recip()?;
                if renormalise { scores.broadcast_div(&(scores.sum_keepdim(1)? + TINY)?)? } else { scores }
            }
        };
        if self.scale == 1.0 { Ok(weights) } else { weights * self.scale }
    }
}

/// Keeps a sum of scores from zero, as in DeepSeek's router.
const TINY: f64 = 1e-20;

/// The numbers of the `k` largest, the largest first and ties in order. What is not a number is larger than anything, so that it is seen.
fn largest(ranks: impl Iterator<Item = (f32, u32)>, k: usize) -> Vec<u32> {
    let order = |a: f32, b: f32| a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()));
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k + 1);
    for (rank, number) in ranks {
        if best.len() == k && best.last().is_some_and(|last| order(rank, last.0) != Ordering::Greater) {
            continue;
        }
        let place = best.partition_point(|other| order(other.0, rank) != Ordering::Less);
        best.insert(place, (rank, number));
        best.truncate(k);
    }
    best.into_iter().map(|(_, number)| number).collect()
}

fn on_host(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn wide(t: &Tensor) -> DType {
    if t.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

fn softmax(logits: &Tensor) -> candle_core::Result<Tensor> {
    // the largest cancels out, and so does its gradient
    let shares = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
    shares.broadcast_div(&shares.sum_keepdim(D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::{
        gradients,
        testing::{assert_close, check_op, random},
    };

    /// Made by scripts/parity/routing.py with transformers.
    const FIXTURE: &str = include_str!("../tests/fixtures/routing.json");

    #[derive(Deserialize)]
    struct Fixture {
        routers: Vec<Router>,
        losses: Vec<Balance>,
    }

    #[derive(Deserialize)]
    struct Router {
        name: String,
        experts: usize,
        top_k: usize,
        scoring: String,
        renormalise: bool,
        scale: f64,
        groups: Option<[usize; 2]>,
        bias: Option<Vec<f32>>,
        logits: Vec<f32>,
        /// In the order of their numbers, as weights and their gradients are.
        chosen: Vec<u32>,
        weights: Vec<f32>,
        dweights: Vec<f32>,
        gradient: Vec<f32>,
    }

    #[derive(Deserialize)]
    struct Balance {
        experts: usize,
        top_k: usize,
        logits: Vec<Vec<f32>>,
        loss: f32,
        gradients: Vec<Vec<f32>>,
    }

    fn fixture() -> Fixture {
        serde_json::from_str(FIXTURE).unwrap()
    }

    fn softmax_spec(experts: usize, top_k: usize) -> RouterSpec {
        RouterSpec { experts, top_k, scoring: Scoring::Softmax, renormalise: false, groups: None, scale: 1.0 }
    }

    impl Router {
        fn spec(&self) -> RouterSpec {
            let scoring = if self.scoring == "softmax" { Scoring::Softmax } else { Scoring::Sigmoid };
            let groups = self.groups.map(|[count, kept]| Groups { count, kept });
            let &Self { experts, top_k, renormalise, scale, .. } = self;
            RouterSpec { experts, top_k, scoring, renormalise, groups, scale }
        }
    }

    fn matrix(data: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(data, (data.len() / width, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn chooses_weighs_and_learns_as_transformers() {
        for router in fixture().routers {
            let (spec, k) = (router.spec(), router.top_k);
            let logits = Value::variable(matrix(&router.logits, router.experts));
            let bias = router.bias.as_ref().map(|bias| Tensor::from_slice(bias, bias.len(), &Device::Cpu).unwrap());
            let Routed { experts, weights } = route(&logits, bias.as_ref(), &spec).unwrap();
            // ours are ordered by rank, theirs by number
            let ours = weights.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut dweights = vec![0.0; ours.len()];
            let mut sorted = Vec::new();
            for (token, experts) in experts.chunks(k).enumerate() {
                let mut order: Vec<usize> = (0..k).collect();
                order.sort_by_key(|&i| experts[i]);
                for (theirs, &i) in order.iter().enumerate() {
                    dweights[token * k + i] = router.dweights[token * k + theirs];
                    sorted.push((experts[i], ours[token * k + i]));
                }
            }
            let (chosen, found): (Vec<u32>, Vec<f32>) = sorted.into_iter().unzip();
            assert_eq!(chosen, router.chosen, "{}", router.name);
            assert_close(&matrix(&router.weights, k), &matrix(&found, k), 1e-6, &router.name);
            let gradient = gradients(vec![(weights, matrix(&dweights, k))], &[&logits]).unwrap().remove(0).unwrap();
            assert_close(&matrix(&router.gradient, router.experts), &gradient, 1e-6, &router.name);
        }
    }

    #[test]
    fn the_loss_of_balance_is_that_of_transformers() {
        for Balance { experts, top_k, logits, loss, gradients: expected } in fixture().losses {
            let layers: Vec<Value> = logits.iter().map(|data| Value::variable(matrix(data, experts))).collect();
            let found = router_loss(&layers, &softmax_spec(experts, top_k)).unwrap();
            assert_close(&Tensor::new(loss, &Device::Cpu).unwrap(), found.tensor(), 1e-6, "loss");
            let one = found.tensor().ones_like().unwrap();
            let grads = gradients(vec![(found, one)], &layers.iter().collect::<Vec<_>>()).unwrap();
            for (want, got) in expected.iter().zip(grads) {
                assert_close(&matrix(want, experts), &got.unwrap(), 1e-5, "gradient");
            }
        }
    }

    /// Weights and loss against central differences and in every dtype, on the CPU and the emulated GPU.
    #[test]
    fn gradients_of_weights_and_loss() {
        let logits = [(random(&[5, 6], 1) * 3.0).unwrap()];
        for (scoring, renormalise) in [Scoring::Softmax, Scoring::Sigmoid].iter().flat_map(|&s| [(s, true), (s, false)])
        {
            let groups = Some(Groups { count: 3, kept: 2 });
            let spec = RouterSpec { scoring, renormalise, groups, scale: 1.5, ..softmax_spec(6, 3) };
            let chosen = route(&Value::constant(logits[0].clone()), None, &spec).unwrap().experts;
            let chosen = Tensor::from_vec(chosen, (5, 3), &Device::Cpu).unwrap();
            let formula = move |t: &[Tensor]| Ok(vec![spec.weights(&t[0], &chosen)?]);
            check_op(&logits, formula, |v| Ok(vec![route(&v[0], None, &spec)?.weights]));
        }
        let spec = softmax_spec(6, 2);
        let counts = |t: &Tensor| {
            let chosen = route(&Value::constant(t.clone()), None, &spec).unwrap().experts;
            (0..6).map(|e| chosen.iter().filter(|&&c| c == e).count() as f64).collect::<Vec<f64>>()
        };
        let counts = Tensor::new(counts(&logits[0]), &Device::Cpu).unwrap();
        let formula = move |t: &[Tensor]| {
            let shares = softmax(&t[0])?.sum(0)?;
            Ok(vec![((shares * counts.to_dtype(t[0].dtype())?)?.sum_all()? * (6.0 / 25.0))?])
        };
        check_op(&logits, formula, |v| router_loss(v, &spec).map(|loss| vec![loss]));
    }

    #[test]
    fn ties_go_to_the_lower_number_and_what_is_no_number_is_seen() {
        assert_eq!(largest([1.0, 3.0, 3.0, 2.0, 3.0].into_iter().zip(0..), 3), [1, 2, 4]);
        assert_eq!(largest([1.0, f32::NAN, f32::INFINITY, 0.5].into_iter().zip(0..), 2), [1, 2]);
        let logits = Value::constant(Tensor::new(&[[0.0f32, f32::NAN, 0.0, 0.0]], &Device::Cpu).unwrap());
        let groups = Some(Groups { count: 2, kept: 1 });
        let routed = route(&logits, None, &RouterSpec { groups, ..softmax_spec(4, 2) }).unwrap();
        assert_eq!(routed.experts.len(), 2);
        assert!(routed.weights.tensor().to_vec2::<f32>().unwrap()[0].iter().any(|weight| weight.is_nan()));
    }

    /// A group is chosen by its two best together, and an expert outside the kept groups never, however good.
    #[test]
    fn experts_of_masked_groups_are_never_chosen() {
        let logits = Value::constant(Tensor::new(&[[9.0f32, -9.0, 2.0, 2.0, 1.0, 1.0]], &Device::Cpu).unwrap());
        let bias = Tensor::new(&[-0.5f32, -5.0, -5.0, -5.0, -5.0, -5.0], &Device::Cpu).unwrap();
        let groups = Some(Groups { count: 3, kept: 1 });
        let spec = RouterSpec { scoring: Scoring::Sigmoid, groups, ..softmax_spec(6, 2) };
        assert_eq!(route(&logits, None, &spec).unwrap().experts, [2, 3]);
        // and where all that is allowed is below zero
        assert_eq!(route(&logits, Some(&bias), &spec).unwrap().experts, [0, 1]);
    }

    #[test]
    fn specs_that_cannot_be_are_refused() {
        let logits = Value::constant(random(&[2, 6], 1).to_dtype(DType::F32).unwrap());
        let groups = |count, kept| RouterSpec { groups: Some(Groups { count, kept }), ..softmax_spec(6, 3) };
        for spec in
            [softmax_spec(6, 0), softmax_spec(6, 7), softmax_spec(5, 2), groups(4, 1), groups(3, 1), groups(0, 0)]
        {
            assert!(route(&logits, None, &spec).is_err(), "{spec:?}");
        }
        let bias = Tensor::new(&[0f32; 5], &Device::Cpu).unwrap();
        assert!(route(&logits, Some(&bias), &softmax_spec(6, 2)).is_err());
        assert!(router_loss(&[], &softmax_spec(6, 2)).is_err());
    }
}
