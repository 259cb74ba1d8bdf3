use std::{cell::RefCell, collections::VecDeque};

use candle_core::Tensor;

use super::{Value, engine::gradients, no_grad, recording, with_recording};
use crate::Result;

/// Which results survive the first run of a checkpointed function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Only the function's inputs: everything runs again in backward.
    #[default]
    KeepNothing,
    /// Results of attention stay; norms, products and activations run again.
    KeepAttention,
}

impl Policy {
    fn keeps(self, op: &str) -> bool {
        match self {
            Self::KeepNothing => false,
            Self::KeepAttention => op == "attention",
        }
    }
}

/// What an enclosing checkpoint does with results of [`keep`].
enum Tape {
    Off,
    Keeping(Policy, VecDeque<Vec<Tensor>>),
    Replaying(Policy, VecDeque<Vec<Tensor>>),
}

thread_local! {
    static TAPE: RefCell<Tape> = const { RefCell::new(Tape::Off) };
}

/// Computes the results of an operation, or takes them back where an enclosing [`checkpoint`] kept them in its first run.
pub fn keep(op: &str, compute: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let kept = TAPE.with_borrow_mut(|tape| match tape {
        Tape::Replaying(policy, kept) if policy.keeps(op) => kept.pop_front(),
        _ => None,
    });
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let results = compute()?;
    TAPE.with_borrow_mut(|tape| match tape {
        Tape::Keeping(policy, kept) if policy.keeps(op) => kept.push_back(results.clone()),
        _ => {}
    });
    Ok(results)
}

/// Runs `f` keeping only its inputs and what `policy` names; backward runs it again.
///
/// `f` must do the same both times: randomness is a function of seed and place, so it does. Parameters that `f` uses by itself get their
/// gradients in the second run.
pub fn checkpoint(
    policy: Policy,
    inputs: &[&Value],
    f: impl Fn(&[Value]) -> Result<Vec<Value>> + Send + 'static,
) -> Result<Vec<Value>> {
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.tensor().clone()).collect();
    let constants: Vec<Value> = tensors.iter().cloned().map(Value::constant).collect();
    if !recording() {
        return f(&constants);
    }
    let needs: Vec<bool> = inputs.iter().map(|v| v.requires_grad()).collect();
    let (outputs, tape) = with_tape(Tape::Keeping(policy, VecDeque::new()), || no_grad(|| f(&constants)));
    let kept = match tape {
        Tape::Keeping(_, kept) => kept,
        _ => VecDeque::new(),
    };
    let outputs = outputs?.iter().map(|v| v.tensor().clone()).collect();
    Ok(Value::record_if(true, outputs, inputs, move |grads| {
        let leaves: Vec<Value> = tensors
            .into_iter()
            .zip(&needs)
            .map(|(t, &need)| if need { Value::variable(t) } else { Value::constant(t) })
            .collect();
        let (outputs, _) = with_tape(Tape::Replaying(policy, kept), || with_recording(true, || f(&leaves)));
        let roots = outputs?.into_iter().zip(grads).filter_map(|(v, g)| Some((v, g?))).collect();
        gradients(roots, &leaves.iter().collect::<Vec<_>>())
    }))
}

fn with_tape<T>(tape: Tape, f: impl FnOnce() -> T) -> (T, Tape) {
    let outer = TAPE.replace(tape);
    let result = f();
    (result, TAPE.replace(outer))
}
