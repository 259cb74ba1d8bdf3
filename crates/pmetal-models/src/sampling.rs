//! How tokens are chosen, and how likely they were.

use std::cmp::Ordering;

use candle_core::Tensor;
use pmetal_ops::Sampling;

use crate::{Error, Result};

/// How to choose tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// How many of the likeliest tokens stay; 0 keeps all.
    pub top_k: usize,
    /// The probability that the likeliest tokens together must reach to stay; 1 keeps all.
    pub top_p: f64,
    /// The share of the likeliest token's probability that a token must reach to stay; 0 keeps all.
    pub min_p: f64,
    /// Divides (or, below zero, multiplies) the logits of tokens that were there already; 1 changes nothing.
    pub repetition_penalty: f64,
    /// The same seed gives the same tokens.
    pub seed: u64,
    /// The longest answer, in tokens.
    pub max_tokens: usize,
    /// Whether to say how likely each token was, and how many of the likeliest to name beside it.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            max_tokens: 256,
            logprobs: None,
        }
    }
}

/// How likely a token was: the log-softmax of the model's own logits, before penalty, temperature and whatever else leaves tokens out.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f64,
    /// The likeliest tokens in order, of equals the lower id first.
    pub top: Vec<(u32, f64)>,
}

impl Logprobs {
    /// Of `token` and the `top` likeliest tokens.
    pub(crate) fn of(logits: &Tensor, token: u32, top: usize) -> Result<Self> {
        let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let greatest = logits.iter().fold(f64::NEG_INFINITY, |max, &logit| max.max(f64::from(logit)));
        let log_sum = greatest + logits.iter().map(|&logit| (f64::from(logit) - greatest).exp()).sum::<f64>().ln();
        let logprob = logits.get(token as usize).map_or(f64::NEG_INFINITY, |&logit| f64::from(logit) - log_sum);
        let mut candidates: Vec<Candidate> = (0u32..).zip(logits).collect();
        if top < candidates.len() {
            candidates.select_nth_unstable_by(top, likelier_first);
            candidates.truncate(top);
        }
        candidates.sort_unstable_by(likelier_first);
        let top = candidates.into_iter().map(|(id, logit)| (id, f64::from(logit) - log_sum)).collect();
        Ok(Self { logprob, top })
    }
}

/// A token: its id, its logit.
type Candidate = (u32, f32);

/// Higher logits first; of equal ones the lower id.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Settings of sampling that are in their ranges.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
}

impl Sampler {
    /// A sampler.
    ///
    /// # Errors
    /// Where a setting is outside its range.
    pub fn new(params: &SamplingParams) -> Result<Self> {
        let check = |key, got: f64, fits: bool, expected| {
            if fits { Ok(()) } else { Err(Error::Setting { key, got, expected }) }
        };
        let p = params;
        check("temperature", p.temperature, p.temperature >= 0.0 && p.temperature.is_finite(), "a number from 0 on")?;
        check("top_p", p.top_p, p.top_p > 0.0 && p.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", p.min_p, (0.0..=1.0).contains(&p.min_p), "from 0 to 1")?;
        let penalty = p.repetition_penalty;
        check("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "above 0")?;
        let &SamplingParams { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = params;
        Ok(Self { sampling: Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed } })
    }

    /// What chooses the tokens of the answer to `prompt`.
    pub(crate) fn answer(&self, prompt: &[u32]) -> pmetal_ops::Sampler {
        pmetal_ops::Sampler::new(self.sampling, prompt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_make_no_sense_are_errors() {
        for change in [
            |p: &mut SamplingParams| p.temperature = -1.0,
            |p: &mut SamplingParams| p.top_p = 0.0,
            |p: &mut SamplingParams| p.min_p = 2.0,
            |p: &mut SamplingParams| p.repetition_penalty = 0.0,
        ] {
            let mut params = SamplingParams::default();
            change(&mut params);
            assert!(Sampler::new(&params).is_err(), "{params:?}");
        }
    }
}
