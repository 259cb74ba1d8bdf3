//! The next token out of logits, in the order of transformers' processors: repetition penalty, temperature, top-k, top-p, min-p.
//!
//! A token's distance is `(greatest logit - its logit) / temperature`, its weight `exp(-distance)`. Top-k keeps the k nearest tokens and those as
//! near as the last of them, top-p the fewest of the nearest (of equals the lower id first) whose weights reach `top_p` of the sum of all,
//! min-p those whose weight is at least `min_p` of the greatest. The draw walks the rest in the order of ids, so that the same seed gives the
//! same token on every device, but for rounding. Sources: Keskar et al., "CTRL", 2019 (penalty); Holtzman et al., "The Curious Case of Neural
//! Text Degeneration", 2020 (top-p); Nguyen et al., "Turning Up the Heat", 2024 (min-p).

use std::cmp::Ordering;

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Result,
    place::{Place, place, upload},
    profile, random,
};

const OP: &str = "sampler";

/// What the kernel answers where there is no token to choose.
const NONE: u32 = u32::MAX;

/// What decides among tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token, of equals the lowest id.
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
}

impl Sampling {
    /// The place in the cumulated probabilities that token `step` of an answer is drawn at.
    fn likelihood(&self, step: u64) -> f32 {
        random::uniform(random::mix(self.seed, &[step]), 0)
    }

    fn inverse_temperature(&self) -> f32 {
        ((1.0 / self.temperature) as f32).min(f32::MAX)
    }

    /// The greatest distance that min-p leaves.
    fn min_p_distance(&self) -> f32 {
        (1.0 / self.min_p).ln() as f32
    }

    fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0
    }
}

/// Chooses the tokens of one answer.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// The prompt and the tokens chosen so far.
    seen: Vec<u32>,
    step: u64,
    room: Option<Room>,
}

impl Sampler {
    /// A sampler for the answer to `prompt`. The settings are in their ranges: see the fields of [`Sampling`].
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        Self { sampling, seen: prompt.to_vec(), step: 0, room: None }
    }

    /// Chooses the next token by `logits` (one for each id, any shape and float dtype), which it counts as seen; none where a logit is NaN or
    /// positive infinity, or none is finite.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn sample(&mut self, logits: &Tensor) -> Result<Option<u32>> {
        let _span = profile::span("sample");
        let logits = logits.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
        let likelihood = self.sampling.likelihood(self.step);
        let token = match place(&logits, OP)? {
            Place::Gpu(gpu) => self.on_gpu(&*gpu, &logits, likelihood)?,
            Place::Cpu | Place::Reference => reference(logits.to_vec1()?, &self.seen, &self.sampling, likelihood),
        };
        self.step += 1;
        self.seen.extend(token);
        Ok(token)
    }

    fn on_gpu(&mut self, gpu: &dyn Gpu, logits: &Tensor, likelihood: f32) -> Result<Option<u32>> {
        // the kernel reads four at a time
        let logits = if logits.layout().start_offset().is_multiple_of(4) { logits.clone() } else { logits.copy()? };
        let room = match self.room.take().filter(|room| room.marks.elem_count() == logits.elem_count()) {
            Some(room) => room,
            None => Room::new(&logits, &self.seen)?,
        };
        let token = empty(1, DType::U32, logits.device())?;
        let s = &self.sampling;
        let params = kernels::SamplerParams {
            vocab: logits.elem_count() as u32,
            news: room.news.elem_count() as u32,
            top_k: s.top_k.min(logits.elem_count()) as u32,
            inverse_temperature: if s.temperature == 0.0 { 0.0 } else { s.inverse_temperature() },
            top_p: s.top_p as f32,
            min_p_distance: s.min_p_distance(),
            repetition_penalty: s.repetition_penalty as f32,
            likelihood,
        };
        let (grid, Room { marks, distances, ids, news }) = (Grid::line(1, 1024), &room);
        kernels::sample_token(gpu, DType::F32, grid, &logits, news, marks, distances, ids, &token, params)?;
        let chosen = token.to_vec1()?.into_iter().find(|&id| id != NONE);
        self.room = Some(Room { news: token, ..room });
        Ok(chosen)
    }
}

/// What the kernel keeps on its device from token to token.
#[derive(Debug)]
struct Room {
    /// Which tokens were seen, `[vocab]`.
    marks: Tensor,
    distances: Tensor,
    ids: Tensor,
    /// Tokens to be marked by the next call: the prompt's, then the one chosen last.
    news: Tensor,
}

impl Room {
    fn new(logits: &Tensor, seen: &[u32]) -> Result<Self> {
        let (vocab, device) = (logits.elem_count(), logits.device());
        let list = 2 * (vocab.next_multiple_of(4) + 4);
        Ok(Self {
            marks: Tensor::zeros(vocab, DType::U32, device)?,
            distances: empty(list, DType::F32, device)?,
            ids: empty(list, DType::U32, device)?,
            news: upload(&unique(seen), device)?,
        })
    }
}

fn unique(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// A token that may still be chosen: its id, its distance.
type Candidate = (u32, f32);

/// The token at place `likelihood` of the cumulated probabilities, after the tokens `seen`.
fn reference(mut logits: Vec<f32>, seen: &[u32], sampling: &Sampling, likelihood: f32) -> Option<u32> {
    if sampling.has_penalty() {
        penalise(&mut logits, seen, sampling.repetition_penalty as f32);
    }
    if logits.iter().any(|&logit| logit.is_nan() || logit == f32::INFINITY) {
        return None;
    }
    let finite = (0u32..).zip(logits).filter(|(_, logit)| logit.is_finite());
    let mut candidates: Vec<Candidate> = finite.collect();
    let (likeliest, top) = candidates.iter().copied().min_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)))?;
    if sampling.temperature == 0.0 {
        return Some(likeliest);
    }
    for (_, logit) in &mut candidates {
        *logit = (top - *logit) * sampling.inverse_temperature();
    }
    keep_top_k(&mut candidates, sampling.top_k);
    keep_top_p(&mut candidates, sampling.top_p);
    candidates.retain(|&(_, distance)| distance <= sampling.min_p_distance());
    candidates.sort_unstable_by_key(|&(id, _)| id);
    Some(draw(&candidates, f64::from(likelihood)).unwrap_or(likeliest))
}

fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    for id in unique(seen) {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

/// The k nearest, and those as near as the last of them.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k == 0 || k >= candidates.len() {
        return;
    }
    let (_, &mut (_, farthest), _) = candidates.select_nth_unstable_by(k - 1, nearer_first);
    candidates.retain(|&(_, distance)| distance <= farthest);
}

/// The fewest of the nearest whose probabilities reach `top_p` together.
fn keep_top_p(candidates: &mut Vec<Candidate>, top_p: f64) {
    if top_p >= 1.0 {
        return;
    }
    candidates.sort_unstable_by(nearer_first);
    let enough = candidates.iter().map(weight).sum::<f64>() * top_p;
    let mut reached = 0.0;
    let kept = candidates.iter().take_while(|candidate| {
        let open = reached < enough;
        reached += weight(candidate);
        open
    });
    let kept = kept.count();
    candidates.truncate(kept);
}

/// Smaller distances first; of equal ones the lower id.
fn nearer_first(a: &Candidate, b: &Candidate) -> Ordering {
    a.1.total_cmp(&b.1).then(a.0.cmp(&b.0))
}

/// The probability times a common factor.
fn weight(&(_, distance): &Candidate) -> f64 {
    (-f64::from(distance)).exp()
}

/// The candidate at `likelihood` (from 0 to 1) of the cumulated probabilities; none where rounding leads beyond the last.
fn draw(candidates: &[Candidate], likelihood: f64) -> Option<u32> {
    let mut left = candidates.iter().map(weight).sum::<f64>() * likelihood;
    let chosen = candidates.iter().find(|candidate| {
        left -= weight(candidate);
        left < 0.0
    });
    chosen.map(|&(id, _)| id)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;
    use pmetal_emulator::Emulator;

    use super::*;
    use crate::emulate;

    const PLAIN: Sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };
    const LOGITS: [f32; 6] = [2.0, -1.0, 1.5, 0.0, 1.5, -3.0];

    fn choose(logits: &[f32], seen: &[u32], sampling: &Sampling, step: u64) -> Option<u32> {
        reference(logits.to_vec(), seen, sampling, sampling.likelihood(step))
    }

    /// How often each token comes up in 20,000 draws.
    fn shares(sampling: &Sampling, seen: &[u32]) -> Vec<f64> {
        let mut counts = [0u32; LOGITS.len()];
        for step in 0..20_000 {
            counts[choose(&LOGITS, seen, sampling, step).unwrap() as usize] += 1;
        }
        counts.iter().map(|&n| f64::from(n) / 20_000.0).collect()
    }

    fn assert_shares(sampling: Sampling, seen: &[u32], want: [f64; 6]) {
        let got = shares(&sampling, seen);
        assert!(
            got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.012 && (w > 0.0 || *g == 0.0)),
            "{got:?}, wanted {want:?}"
        );
    }

    // transformers 5.23: torch.softmax of what each LogitsWarper or LogitsProcessor makes of LOGITS
    #[test]
    fn shares_are_those_of_the_processors_of_transformers() {
        assert_shares(PLAIN, &[], [0.415_81, 0.020_7, 0.252_2, 0.056_27, 0.252_2, 0.002_8]);
        let half = [0.569_28, 0.001_41, 0.209_43, 0.010_43, 0.209_43, 0.000_03];
        assert_shares(Sampling { temperature: 0.5, ..PLAIN }, &[], half);
        let two = [0.451_86, 0.0, 0.274_07, 0.0, 0.274_07, 0.0];
        assert_shares(Sampling { top_k: 2, ..PLAIN }, &[], two);
        assert_shares(Sampling { top_p: 0.7, ..PLAIN }, &[], two);
        assert_shares(Sampling { min_p: 0.1, ..PLAIN }, &[], [0.425_82, 0.0, 0.258_27, 0.057_63, 0.258_27, 0.0]);
        let penalised = [0.270_4, 0.015_9, 0.319_44, 0.071_28, 0.319_44, 0.003_55];
        assert_shares(Sampling { repetition_penalty: 1.5, ..PLAIN }, &[0, 1, 1], penalised);
    }

    #[test]
    fn greedy_takes_the_likeliest_and_of_equals_the_first() {
        let greedy = Sampling { temperature: 0.0, ..PLAIN };
        assert_eq!(choose(&LOGITS, &[], &greedy, 0), Some(0));
        assert_eq!(choose(&[1.0, 3.0, 3.0], &[], &greedy, 0), Some(1));
        assert_eq!(choose(&LOGITS, &[0], &Sampling { repetition_penalty: 2.0, ..greedy }, 0), Some(2));
    }

    #[test]
    fn of_equals_at_the_end_of_top_p_the_lower_ids_stay() {
        let equals = [1.0, 0.0, 1.0, 1.0, 1.0];
        let sampling = Sampling { top_p: 0.4, ..PLAIN };
        let drawn: Vec<u32> = (0..200).map(|step| choose(&equals, &[], &sampling, step).unwrap()).collect();
        assert_eq!(unique(&drawn), [0, 2]);
        let mut sampler = Sampler::new(sampling, &[]);
        let on_gpu = emulate(Arc::new(Emulator::new()), || {
            let logits = Tensor::new(&equals[..], &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            (0..40).map(|_| sampler.sample(&logits).unwrap().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(on_gpu, drawn[..40]);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let draw = |seed: u64| {
            (0..50).map(|step| choose(&LOGITS, &[], &Sampling { seed, ..PLAIN }, step).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    /// Logits of `vocab` tokens around zero, some masked.
    fn random_logits(vocab: usize, seed: u64) -> Vec<f32> {
        let logit = |i| if i % 97 == 13 { f32::NEG_INFINITY } else { 3.0 * pmetal_cpu::normal(seed, i) };
        (0..vocab as u64).map(logit).collect()
    }

    #[test]
    fn the_kernel_chooses_as_the_reference_does() {
        let emulator = Arc::new(Emulator::new());
        let settings = [
            PLAIN,
            Sampling { temperature: 0.0, repetition_penalty: 1.3, ..PLAIN },
            Sampling { top_k: 20, ..PLAIN },
            Sampling { top_p: 0.9, ..PLAIN },
            Sampling { min_p: 0.05, ..PLAIN },
            Sampling { temperature: 0.7, top_k: 50, top_p: 0.8, min_p: 0.02, repetition_penalty: 1.2, seed: 5 },
            Sampling { temperature: 1.6, top_k: 1500, top_p: 0.97, repetition_penalty: 0.9, seed: 9, ..PLAIN },
        ];
        for (vocab, steps) in [(1, 2), (5, 6), (100, 6), (1000, 5), (5003, 4), (50_257, 1)] {
            for (i, sampling) in settings.into_iter().enumerate() {
                let prompt: Vec<u32> = (0..20).map(|i| i * i % vocab as u32).collect();
                let (mut kernel, mut host) = (Sampler::new(sampling, &prompt), Sampler::new(sampling, &prompt));
                for step in 0..steps {
                    let logits = random_logits(vocab, 31 * i as u64 + step);
                    let logits = Tensor::new(logits, &Device::Cpu).unwrap();
                    let want = host.sample(&logits).unwrap();
                    let got = emulate(emulator.clone(), || kernel.sample(&logits)).unwrap();
                    assert_eq!((got, kernel.seen.len()), (want, host.seen.len()), "{vocab} {sampling:?} step {step}");
                }
            }
        }
        assert!(pmetal_emulator::launched().iter().any(|&(name, _)| name == "sample_token"));
    }

    #[test]
    fn logits_that_are_not_finite_choose_nothing() {
        let emulator = Arc::new(Emulator::new());
        for temperature in [0.0, 1.0] {
            for logits in [[0.0, f32::NAN], [0.0, -f32::NAN], [f32::INFINITY, 0.0], [f32::NEG_INFINITY; 2]] {
                let logits = Tensor::new(&logits, &Device::Cpu).unwrap();
                let mut sampler = Sampler::new(Sampling { temperature, ..PLAIN }, &[0]);
                assert_eq!(sampler.sample(&logits).unwrap(), None);
                assert_eq!(emulate(emulator.clone(), || sampler.sample(&logits)).unwrap(), None);
            }
        }
    }
}
