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
    pub(crate) fn of(logits: &[f32], token: u32, top: usize) -> Self {
        let mut candidates: Vec<Candidate> = (0u32..).zip(logits.iter().copied()).collect();
        let greatest = greatest(&candidates);
        let log_sum = greatest + weights(&candidates).iter().sum::<f64>().ln();
        let logprob = logits.get(token as usize).map_or(f64::NEG_INFINITY, |&logit| f64::from(logit) - log_sum);
        if top < candidates.len() {
            candidates.select_nth_unstable_by(top, likelier_first);
            candidates.truncate(top);
        }
        candidates.sort_unstable_by(likelier_first);
        Self { logprob, top: candidates.into_iter().map(|(id, logit)| (id, f64::from(logit) - log_sum)).collect() }
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
        let check = |key, got: f64, fits: bool, expected| {
            if fits { Ok(()) } else { Err(Error::Setting { key, got, expected }) }
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [2.0, -1.0, 1.5, 0.0, 1.5, -3.0];

    fn sampler(change: impl FnOnce(&mut SamplingParams)) -> Sampler {
        let mut params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        change(&mut params);
        Sampler::new(&params).unwrap()
    }

    /// How often each token comes up in 20,000 draws.
    fn shares(sampler: &Sampler, seen: &[u32]) -> Vec<f64> {
        let mut counts = [0u32; LOGITS.len()];
        for step in 0..20_000 {
            counts[sampler.sample(&LOGITS, seen, step).unwrap() as usize] += 1;
        }
        counts.iter().map(|&n| f64::from(n) / 20_000.0).collect()
    }

    fn assert_shares(sampler: &Sampler, seen: &[u32], want: [f64; 6]) {
        let got = shares(sampler, seen);
        assert!(
            got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.012 && (w > 0.0 || *g == 0.0)),
            "{got:?}, wanted {want:?}"
        );
    }

    // transformers 5.23: torch.softmax of what each LogitsWarper or LogitsProcessor makes of LOGITS
    #[test]
    fn shares_are_those_of_the_processors_of_transformers() {
        assert_shares(&sampler(|_| ()), &[], PLAIN);
        assert_shares(&sampler(|p| p.temperature = 0.5), &[], TEMPERATURE_HALF);
        assert_shares(&sampler(|p| p.top_k = 2), &[], TOP_2);
        assert_shares(&sampler(|p| p.top_p = 0.7), &[], TOP_P_07);
        assert_shares(&sampler(|p| p.min_p = 0.1), &[], MIN_P_01);
        assert_shares(&sampler(|p| p.repetition_penalty = 1.5), &[0, 1, 1], PENALTY_15);
    }

    const PLAIN: [f64; 6] = [0.415_81, 0.020_7, 0.252_2, 0.056_27, 0.252_2, 0.002_8];
    const TEMPERATURE_HALF: [f64; 6] = [0.569_28, 0.001_41, 0.209_43, 0.010_43, 0.209_43, 0.000_03];
    const TOP_2: [f64; 6] = [0.451_86, 0.0, 0.274_07, 0.0, 0.274_07, 0.0];
    const TOP_P_07: [f64; 6] = TOP_2;
    const MIN_P_01: [f64; 6] = [0.425_82, 0.0, 0.258_27, 0.057_63, 0.258_27, 0.0];
    const PENALTY_15: [f64; 6] = [0.270_4, 0.015_9, 0.319_44, 0.071_28, 0.319_44, 0.003_55];

    #[test]
    fn greedy_takes_the_likeliest_and_of_equals_the_first() {
        let greedy = sampler(|p| p.temperature = 0.0);
        assert_eq!(greedy.sample(&LOGITS, &[], 0).unwrap(), 0);
        assert_eq!(greedy.sample(&[1.0, 3.0, 3.0], &[], 0).unwrap(), 1);
        let penalised = sampler(|p| (p.temperature, p.repetition_penalty) = (0.0, 2.0));
        assert_eq!(penalised.sample(&LOGITS, &[0], 0).unwrap(), 2);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let draw = |seed: u64| {
            let sampler = sampler(|p| p.seed = seed);
            (0..50).map(|step| sampler.sample(&LOGITS, &[], step).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn settings_and_logits_that_make_no_sense_are_errors() {
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
        for temperature in [0.0, 1.0] {
            let sampler = sampler(|p| p.temperature = temperature);
            assert!(sampler.sample(&[0.0, f32::NAN], &[], 0).is_err());
            assert!(sampler.sample(&[f32::NEG_INFINITY; 2], &[], 0).is_err());
        }
    }
}
