//! Continuing a prompt, token by token.

use std::{ops::ControlFlow, time::Instant};

use pmetal_ops::no_grad;

use crate::{CausalLMModel, Error, Input, KvCache, Result, Sampler, SamplingParams};

/// Tokens of an answer the cache has room for at first: memory follows what is said, not what may be.
const FIRST_ROOM: usize = 512;

/// What came of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens, without the one that ended them.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub stop: StopReason,
    /// Time to read the prompt.
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

/// Continues `prompt` until a token of `stop_ids`, `max_tokens`, the end of the context, or `on_token` breaks.
///
/// `on_token` sees each token as it is made; a stop token is neither shown nor returned.
///
/// # Errors
/// Where the prompt is empty or fills the model's context, a sampling setting is outside its range, or logits are not finite.
pub fn generate(
    model: &dyn CausalLMModel,
    prompt: &[u32],
    params: &SamplingParams,
    stop_ids: &[u32],
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    let sampler = Sampler::new(params)?;
    let context = model.spec().max_position_embeddings;
    if prompt.len() >= context {
        return Err(Error::Context { prompt: prompt.len(), context });
    }
    let limit = params.max_tokens.min(context - prompt.len());
    let full = if limit < params.max_tokens { StopReason::Context } else { StopReason::Length };
    let most = prompt.len() + limit;
    let room = most.min(prompt.len() + FIRST_ROOM);
    let mut cache = KvCache::new(model.spec(), 1, room, model.dtype(), &model.device())?;

    let started = Instant::now();
    let mut logits = next_logits(model, prompt, &mut cache)?;
    let prompt_seconds = started.elapsed().as_secs_f64();

    let started = Instant::now();
    let mut seen = prompt.to_vec();
    let mut stop = full;
    for step in 0..limit {
        let token = sampler.sample(&logits, &seen, step as u64)?;
        if stop_ids.contains(&token) {
            stop = StopReason::Eos;
            break;
        }
        seen.push(token);
        if on_token(token).is_break() {
            stop = StopReason::Caller;
            break;
        }
        if step + 1 < limit {
            if seen.len() > cache.capacity() {
                cache.grow(most.min(2 * cache.capacity()))?;
            }
            logits = next_logits(model, &[token], &mut cache)?;
        }
    }
    let tokens = seen.split_off(prompt.len());
    Ok(Generation { tokens, stop, prompt_seconds, decode_seconds: started.elapsed().as_secs_f64() })
}

/// Reads `ids` and returns the logits behind the last of them: the head sees no other.
fn next_logits(model: &dyn CausalLMModel, ids: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
    let hidden = no_grad(|| model.forward(&Input::rows(ids, &[ids.len()]), Some(cache)))?;
    let last = hidden.tensor().narrow(0, ids.len() - 1, 1)?;
    Ok(model.logits(&last)?.flatten_all()?.to_vec1()?)
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
        assert_eq!(message, "the prompt has 3 tokens, the model's context 3");
        let empty = generate(&*model(9), &[], &SamplingParams::default(), &[], &mut |_| ControlFlow::Continue(()));
        assert!(empty.is_err());
    }
}
