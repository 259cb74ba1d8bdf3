//! Layers that run again in backward.

use std::sync::{Mutex, PoisonError};

use pmetal_ops::{Fate, Policy, Saved, Value, checkpoint, no_grad};

use super::{layer::Passed, norm::Norm, parts::take};
use crate::{Error, Result};

/// Which layers run again in backward, and what of them survives the first run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checkpointing {
    /// What becomes of the results of a layer.
    pub policy: Policy,
    /// In so many of the last layers a result stays on the device, whatever the policy says: in the order of [`Saved::ALL`].
    pub kept: [usize; Saved::ALL.len()],
    /// So many of the last layers do not run again.
    pub whole: usize,
}

impl Checkpointing {
    /// Nothing survives but the stream before each layer.
    pub const INPUTS: Self = Self::of(Policy::INPUTS);

    /// Results of attention stay too.
    pub const ATTENTION: Self = Self::of(Policy::INPUTS.with(Saved::Attention, Fate::Keep));

    /// The stream before attention and before the MLP, and results of attention, rest in the host's memory.
    pub const HOST: Self = Self::of(
        Policy::INPUTS
            .with(Saved::Input, Fate::Host)
            .with(Saved::Middle, Fate::Host)
            .with(Saved::Attention, Fate::Host),
    );

    /// The same in every layer.
    pub const fn of(policy: Policy) -> Self {
        Self { policy, kept: [0; Saved::ALL.len()], whole: 0 }
    }

    /// The policy of layer `index` of `layers`; none where it does not run again.
    pub fn policy(&self, index: usize, layers: usize) -> Option<Policy> {
        let behind = layers.saturating_sub(index);
        if behind <= self.whole {
            return None;
        }
        let kept = Saved::ALL.into_iter().zip(self.kept).filter(|&(_, kept)| behind <= kept);
        Some(kept.fold(self.policy, |policy, (saved, _)| policy.with(saved, Fate::Keep)))
    }
}

/// A part of a layer that adds something to the residual stream, run again in backward. `f` goes from the stream and its norm to the two parts
/// of the next stream and what a router computed; returns the stream, its norm behind `next`, and the latter. `normed` is the norm of `stream`, through which no gradient flows: it is formed again.
pub(super) fn residual(
    policy: Policy,
    [norm, next]: [Norm; 2],
    stream: &Value,
    normed: Value,
    f: impl Fn(Value, &Value) -> Result<(Value, Value, Option<Value>)> + Send + 'static,
) -> Result<Passed> {
    let formed = Mutex::new(Some(normed));
    let parts = checkpoint(policy, &[stream], move |inputs| {
        let formed = formed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (stream, normed) = match formed {
            Some(normed) => (inputs[0].clone(), normed),
            None => norm.of(&inputs[0]).map_err(into_ops)?,
        };
        let (stream, added, router) = f(stream, &normed).map_err(into_ops)?;
        Ok([stream, added].into_iter().chain(router).collect())
    })?;
    let mut parts = parts.into_iter();
    let [stream, added] = take(parts.by_ref().take(2).collect())?;
    let router = parts.next();
    let (sum, normed) = no_grad(|| next.of_sum(&added, &stream))?;
    let sum = Value::record(vec![sum.tensor().clone()], &[&stream, &added], |grads| {
        let dsum = grads.into_iter().next().flatten();
        Ok(vec![dsum.clone(), dsum])
    });
    let [sum] = take(sum)?;
    Ok((sum, normed, router))
}

/// An error inside a function that [`checkpoint`] runs.
fn into_ops(error: Error) -> pmetal_ops::Error {
    match error {
        Error::Ops(error) => error,
        Error::Candle(error) => error.into(),
        other => candle_core::Error::Msg(other.to_string()).into(),
    }
}
