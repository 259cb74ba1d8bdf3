//! Continuing a prompt, token by token.

use std::{ops::ControlFlow, time::Instant};

use candle_core::Tensor;
use pmetal_ops::no_grad;

use crate::{CausalLMModel, Error, Input, KvCache, Logprobs, OneToken, Result, Sampler, SamplingParams};

/// Tokens of an answer the cache has room for at first: memory follows what is said, not what may be.
const FIRST_ROOM: usize = 512;

/// Tokens of a prompt that are read at once: between two such pieces the caller may stop.
const PIECE: usize = 512;

/// What came of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens, without the one that ended them.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub stop: StopReason,
    /// Tokens of the prompt that were known from before and not read again.
    pub kept: usize,
    /// Time to read the rest of the prompt.
    pub prompt_seconds: f64,
    /// Time to make the tokens.
    pub decode_seconds: f64,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The model chose a stop token.
    Eos,
    /// `max_tokens` are there.
    Length,
    /// The model's context is full.
    Context,
    /// The caller had enough.
    Caller,
}

/// What happens on the way; the caller may stop after each.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A piece of the prompt is read.
    Read,
    /// A token is made.
    Token {
        /// The token.
        id: u32,
        /// How likely it was, where [`SamplingParams::logprobs`] asks for that.
        logprobs: Option<Logprobs>,
    },
}

/// Continues `prompt` until a token of `stop_ids`, `max_tokens`, the end of the context, or `on_token` breaks.
///
/// `on_token` sees each token as it is made; a stop token is neither shown nor returned.
///
/// # Errors
/// As [`Session::generate`].
pub fn generate(
    model: &dyn CausalLMModel,
    prompt: &[u32],
    params: &SamplingParams,
    stop_ids: &[u32],
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    Session::new(model)?.generate(model, prompt, params, stop_ids, &mut |event| match event {
        Event::Read => ControlFlow::Continue(()),
        Event::Token { id, .. } => on_token(id),
    })
}

/// What a model has read and said, so that the next prompt that begins with it is read only from where it differs.
#[derive(Debug)]
pub struct Session {
    cache: KvCache,
    /// The tokens in the cache.
    ids: Vec<u32>,
    one_token: Ready,
}

/// Whether the model has a way of its own to read single tokens into the cache.
#[derive(Debug)]
enum Ready {
    /// It was not asked since the cache or the model changed.
    Unasked,
    No,
    Yes(Box<OneToken>),
}

impl Session {
    /// A session that has read nothing.
    ///
    /// # Errors
    /// Where there is no memory for its cache.
    pub fn new(model: &dyn CausalLMModel) -> Result<Self> {
        let cache = KvCache::new(model.spec(), 1, 0, model.dtype(), &model.device())?;
        Ok(Self { cache, ids: Vec::new(), one_token: Ready::Unasked })
    }

    /// Forgets everything: needed where the model became another one, as by an adapter.
    pub fn clear(&mut self) {
        self.cache.truncate(0, 0);
        self.ids.clear();
        self.one_token = Ready::Unasked;
    }

    /// Tokens that are held.
    pub fn held(&self) -> usize {
        self.ids.len()
    }

    /// Continues `prompt` until a token of `stop_ids`, `max_tokens`, the end of the context, or `on_event` breaks.
    ///
    /// `model` is the one of the calls before. What the prompt has in common with what is held is not read again; what is held beyond
    /// that is forgotten. A stop token is neither shown nor returned.
    ///
    /// # Errors
    /// Where the prompt is empty or fills the model's context, a sampling setting is outside its range, or logits are not finite.
    pub fn generate(
        &mut self,
        model: &dyn CausalLMModel,
        prompt: &[u32],
        params: &SamplingParams,
        stop_ids: &[u32],
        on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut sampler = Sampler::new(params)?.answer(prompt);
        let context = model.spec().max_position_embeddings;
        if prompt.len() >= context {
            return Err(Error::Context { prompt: prompt.len(), context });
        }
        let limit = params.max_tokens.min(context - prompt.len());
        let full = if limit < params.max_tokens { StopReason::Context } else { StopReason::Length };
        let most = prompt.len() + limit;

        let started = Instant::now();
        let kept = self.cut_back_to(prompt);
        self.make_room(most.min(prompt.len() + FIRST_ROOM))?;
        let mut generation =
            Generation { tokens: Vec::new(), stop: full, kept, prompt_seconds: 0.0, decode_seconds: 0.0 };
        let Some(mut logits) = self.read_prompt(model, prompt, on_event)? else {
            let prompt_seconds = started.elapsed().as_secs_f64();
            return Ok(Generation { stop: StopReason::Caller, prompt_seconds, ..generation });
        };
        generation.prompt_seconds = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let mut seen = prompt.to_vec();
        for step in 0..limit {
            let token = sampler.sample(&logits)?.ok_or(Error::NotFinite { tokens: seen.len() })?;
            if stop_ids.contains(&token) {
                generation.stop = StopReason::Eos;
                break;
            }
            seen.push(token);
            let logprobs = params.logprobs.map(|top| Logprobs::of(&logits, token, top)).transpose()?;
            if on_event(Event::Token { id: token, logprobs }).is_break() {
                generation.stop = StopReason::Caller;
                break;
            }
            if step + 1 < limit {
                if seen.len() > self.cache.capacity() {
                    self.make_room(most.min(2 * self.cache.capacity()))?;
                }
                logits = self.next_logits(model, &[token])?;
            }
        }
        generation.tokens = seen.split_off(prompt.len());
        generation.decode_seconds = started.elapsed().as_secs_f64();
        Ok(generation)
    }

    /// Forgets what does not begin `prompt`, and at least its last token: there must be one to read. Returns what stays.
    fn cut_back_to(&mut self, prompt: &[u32]) -> usize {
        let common = self.ids.iter().zip(prompt).take_while(|(held, id)| held == id).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        self.ids.truncate(kept);
        self.cache.truncate(0, kept);
        kept
    }

    /// Reads what is not held of `prompt`, and returns the logits behind it; none where the caller stopped on the way.
    fn read_prompt(
        &mut self,
        model: &dyn CausalLMModel,
        prompt: &[u32],
        on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Option<Tensor>> {
        let rest = prompt.get(self.ids.len()..).unwrap_or_default();
        let last = rest.len().saturating_sub(1) / PIECE;
        for (i, piece) in rest.chunks(PIECE).enumerate() {
            if i == last {
                return self.next_logits(model, piece).map(Some);
            }
            self.read(model, piece)?;
            if on_event(Event::Read).is_break() {
                return Ok(None);
            }
        }
        Err(Error::Input { reason: "the prompt has no token".into() })
    }

    fn make_room(&mut self, capacity: usize) -> Result<()> {
        if capacity > self.cache.capacity() {
            self.one_token = Ready::Unasked;
        }
        self.cache.grow(capacity)
    }

    /// Reads `ids` and returns the logits behind the last of them: the head sees no other.
    fn next_logits(&mut self, model: &dyn CausalLMModel, ids: &[u32]) -> Result<Tensor> {
        if let &[id] = ids
            && (id as usize) < model.spec().vocab_size
        {
            if let Ready::Unasked = self.one_token {
                self.one_token =
                    model.one_token(&self.cache)?.map_or(Ready::No, |one_token| Ready::Yes(Box::new(one_token)));
            }
            if let Ready::Yes(one_token) = &mut self.one_token {
                self.cache.lens_with(&[1])?;
                let logits = one_token.read(id, self.ids.len() as u32)?;
                self.cache.advance(&[id], &[1]);
                self.ids.push(id);
                return Ok(logits);
            }
        }
        let hidden = self.read(model, ids)?;
        let last = hidden.narrow(0, ids.len() - 1, 1)?;
        model.logits(&last)
    }

    fn read(&mut self, model: &dyn CausalLMModel, ids: &[u32]) -> Result<Tensor> {
        let hidden = no_grad(|| model.forward(&Input::rows(ids, &[ids.len()]), Some(&mut self.cache)))?;
        self.ids.extend_from_slice(ids);
        Ok(hidden.tensor().clone())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use serde_json::json;

    use super::*;

    fn model(context: usize) -> Box<dyn CausalLMModel> {
        let config = json!({"model_type": "llama", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": context, "initializer_range": 1.0});
        crate::random(&config, DType::F32, &Device::Cpu, 5, None).unwrap()
    }

    fn run(context: usize, max_tokens: usize, stop_ids: &[u32], enough: usize) -> Result<Generation> {
        let params = SamplingParams { max_tokens, ..SamplingParams::default() };
        let mut left = enough;
        let mut on_token = |_| {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        generate(&*model(context), &[1, 2, 3], &params, stop_ids, &mut on_token)
    }

    #[test]
    fn every_way_to_stop() {
        let all = run(100, 6, &[], 99).unwrap();
        assert_eq!((all.tokens.len(), all.stop), (6, StopReason::Length));
        let full = run(7, 6, &[], 99).unwrap();
        assert_eq!((full.tokens.as_slice(), full.stop), (&all.tokens[..4], StopReason::Context));
        let enough = run(100, 6, &[], 2).unwrap();
        assert_eq!((enough.tokens.as_slice(), enough.stop), (&all.tokens[..2], StopReason::Caller));
        let end = all.tokens[3];
        let first = all.tokens.iter().position(|&t| t == end).unwrap();
        let ended = run(100, 6, &[end], 99).unwrap();
        assert_eq!((ended.tokens.as_slice(), ended.stop), (&all.tokens[..first], StopReason::Eos));
        let beyond_first_room = run(1000, FIRST_ROOM + 3, &[], 999).unwrap();
        assert_eq!(
            (beyond_first_room.tokens.len(), &beyond_first_room.tokens[..6]),
            (FIRST_ROOM + 3, all.tokens.as_slice())
        );
        assert!(run(100, 0, &[], 99).unwrap().tokens.is_empty());
    }

    #[test]
    fn a_prompt_that_fills_the_context_is_refused() {
        let message = run(3, 6, &[], 99).unwrap_err().to_string();
        assert_eq!(message, "the prompt has 3 tokens, the model's context 3: shorten it by 1 or more");
        let empty = generate(&*model(9), &[], &SamplingParams::default(), &[], &mut |_| ControlFlow::Continue(()));
        assert!(empty.is_err());
    }

    /// The answer to `prompt`, and how many tokens of it were not read again.
    fn answer(session: &mut Session, prompt: &[u32], max_tokens: usize) -> (Vec<u32>, usize) {
        let params = SamplingParams { max_tokens, ..SamplingParams::default() };
        let all = session.generate(&*model(2000), prompt, &params, &[], &mut |_| ControlFlow::Continue(())).unwrap();
        (all.tokens, all.kept)
    }

    #[test]
    fn a_session_reads_only_what_it_does_not_hold() {
        let model = model(2000);
        let mut session = Session::new(&*model).unwrap();
        let alone = |prompt: &[u32]| answer(&mut Session::new(&*model).unwrap(), prompt, 7).0;
        let (first, kept) = answer(&mut session, &[1, 2, 3], 7);
        assert_eq!((first.as_slice(), kept), (alone(&[1, 2, 3]).as_slice(), 0));
        // the last token was chosen and not read
        assert_eq!(session.held(), 9);
        let onward = [&[1, 2, 3], first.as_slice(), &[4, 5]].concat();
        assert_eq!(answer(&mut session, &onward, 7), (alone(&onward), 9));
        // another way from the fifth token on
        let other = [&onward[..4], &[19, 6]].concat();
        assert_eq!(answer(&mut session, &other, 7), (alone(&other), 4));
        // the same again: its last token is read for its logits
        assert_eq!(answer(&mut session, &other, 7), (alone(&other), 5));
        assert_eq!(answer(&mut session, &[9], 7), (alone(&[9]), 0));
        session.clear();
        assert_eq!(answer(&mut session, &other, 7), (alone(&other), 0));
    }

    #[test]
    fn a_long_prompt_is_read_in_pieces_and_may_be_stopped_between_them() {
        let model = model(2000);
        let prompt: Vec<u32> = (0..1100).map(|i| i * 7 % 20).collect();
        let mut pieces = 0;
        let mut session = Session::new(&*model).unwrap();
        let params = SamplingParams { max_tokens: 3, ..SamplingParams::default() };
        let stopped = session.generate(&*model, &prompt, &params, &[], &mut |event| {
            assert_eq!(event, Event::Read);
            pieces += 1;
            if pieces == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let stopped = stopped.unwrap();
        assert_eq!((stopped.tokens.len(), stopped.stop, session.held()), (0, StopReason::Caller, 1024));
        let (rest, kept) = answer(&mut session, &prompt, 3);
        assert_eq!((rest.len(), kept), (3, 1024));
        let hidden = no_grad(|| model.forward(&Input::rows(&prompt, &[1100]), None)).unwrap();
        let logits = model.logits(&hidden.tensor().narrow(0, 1099, 1).unwrap()).unwrap();
        let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        let likeliest = (0u32..20).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
        assert_eq!(Some(rest[0]), likeliest);
    }
}
