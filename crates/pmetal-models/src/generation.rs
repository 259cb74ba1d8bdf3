//! Continuing a prompt, token by token.

use std::{ops::ControlFlow, time::Instant};

use pmetal_ops::no_grad;

use crate::{CausalLMModel, Error, Input, KvCache, Result, Sampler, SamplingParams};

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
    let mut cache = KvCache::new(model.spec(), 1, prompt.len() + limit, model.dtype(), &model.device())?;

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
