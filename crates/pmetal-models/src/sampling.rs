//! The next token out of logits, in the order of transformers' processors: repetition penalty, temperature, top-k, top-p, min-p.

use std::cmp::Ordering;

use pmetal_ops::random;

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
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0, max_tokens: 256 }
    }
}

/// Chooses tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
}

/// A token that may still be chosen: its id, its logit.
type Candidate = (u32, f32);

impl Sampler {
    /// A sampler.
    ///
    /// # Errors
    /// Where a setting is outside its range.
    pub fn new(params: &SamplingParams) -> Result<Self> {
        let check = |key, got: f64, fits: bool, expected| if fits { Ok(()) } else { Err(Error::Setting { key, got, expected }) };
        let p = params;
        check("temperature", p.temperature, p.temperature >= 0.0 && p.temperature.is_finite(), "a number from 0 on")?;
        check("top_p", p.top_p, p.top_p > 0.0 && p.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", p.min_p, (0.0..=1.0).contains(&p.min_p), "from 0 to 1")?;
        let penalty = p.repetition_penalty;
        check("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "above 0")?;
        Ok(Self { params: params.clone() })
    }

    /// Chooses the token at place `step` of the answer, after the tokens `seen` (prompt and answer so far).
    ///
    /// # Errors
    /// Where no logit is finite, or one is NaN.
    pub fn sample(&self, logits: &[f32], seen: &[u32], step: u64) -> Result<u32> {
        let not_finite = || Error::NotFinite { tokens: seen.len() };
        let mut logits = logits.to_vec();
        self.penalise(&mut logits, seen);
        if logits.iter().any(|l| l.is_nan()) {
            return Err(not_finite());
        }
        let mut candidates: Vec<Candidate> = (0u32..).zip(logits).filter(|(_, l)| l.is_finite()).collect();
        if self.params.temperature == 0.0 {
            let likeliest = candidates.into_iter().min_by(likelier_first);
            return likeliest.map(|(id, _)| id).ok_or_else(not_finite);
        }
        for (_, logit) in &mut candidates {
            *logit = (f64::from(*logit) / self.params.temperature) as f32;
        }
        self.keep_top_k(&mut candidates);
        self.keep_top_p(&mut candidates);
        self.keep_min_p(&mut candidates);
        let likelihood = random::uniform(random::mix(self.params.seed, &[step]), 0);
        draw(&candidates, f64::from(likelihood)).ok_or_else(not_finite)
    }

    fn penalise(&self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.params.repetition_penalty as f32;
        if penalty == 1.0 {
            return;
        }
        let mut ids = seen.to_vec();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }

    /// The k likeliest, and those as likely as the last of them.
    fn keep_top_k(&self, candidates: &mut Vec<Candidate>) {
        let k = self.params.top_k;
        if k == 0 || k >= candidates.len() {
            return;
        }
        let (_, &mut (_, least), _) = candidates.select_nth_unstable_by(k - 1, likelier_first);
        candidates.retain(|&(_, logit)| logit >= least);
    }

    /// The fewest of the likeliest whose probabilities reach `top_p` together.
    fn keep_top_p(&self, candidates: &mut Vec<Candidate>) {
        if self.params.top_p >= 1.0 {
            return;
        }
        candidates.sort_unstable_by(likelier_first);
        let weights = weights(candidates);
        let enough = weights.iter().sum::<f64>() * self.params.top_p;
        let mut reached = 0.0;
        let kept = weights.iter().take_while(|&&weight| {
            let open = reached < enough;
            reached += weight;
            open
        });
        let kept = kept.count().max(1);
        candidates.truncate(kept);
    }

    fn keep_min_p(&self, candidates: &mut Vec<Candidate>) {
        if self.params.min_p > 0.0 {
            let least = greatest(candidates) + self.params.min_p.ln();
            candidates.retain(|&(_, logit)| f64::from(logit) >= least);
        }
    }
}

/// Higher logits first; of equal ones the lower id.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn greatest(candidates: &[Candidate]) -> f64 {
    candidates.iter().fold(f64::NEG_INFINITY, |max, &(_, logit)| max.max(f64::from(logit)))
}

/// The probabilities times a common factor.
fn weights(candidates: &[Candidate]) -> Vec<f64> {
    let top = greatest(candidates);
    candidates.iter().map(|&(_, logit)| (f64::from(logit) - top).exp()).collect()
}

/// The candidate at `likelihood` (from 0 to 1) of the cumulated probabilities.
fn draw(candidates: &[Candidate], likelihood: f64) -> Option<u32> {
    let weights = weights(candidates);
    let mut left = weights.iter().sum::<f64>() * likelihood;
    let chosen = candidates.iter().zip(&weights).find(|&(_, &weight)| {
        left -= weight;
        left < 0.0
    });
    chosen.map(|(candidate, _)| candidate).or(candidates.last()).map(|&(id, _)| id)
}
