//! Functions that run again in backward instead of keeping what they computed.

mod policy;
mod stowed;
#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    mem,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use candle_core::{DType, Device, Shape, Tensor};

pub use policy::{Fate, Policy, Saved};

use self::stowed::Stowed;
use super::{Value, engine::gradients, no_grad, recording, with_recording};
use crate::Result;

/// The run that an enclosing [`checkpoint`] is at.
enum Run {
    First(Policy, Stowed),
    Second(Policy, Stowed),
}

/// What the operations inside know of their results.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// A policy decides on them. Of [`Saved::Middle`] it decides on what they are added to.
    Saved(Saved),
    /// Nobody reads them in the second run.
    Last,
}

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
    static SCOPE: Cell<Option<Scope>> = const { Cell::new(None) };
    /// What the checkpoint before left: its backward comes behind that of the next.
    static BEFORE: RefCell<Weak<Mutex<Stowed>>> = const { RefCell::new(Weak::new()) };
}

/// Runs `f`, whose operation computes what the policy of an enclosing [`checkpoint`] calls `saved`.
pub fn saved<T>(saved: Saved, f: impl FnOnce() -> T) -> T {
    in_scope(Some(Scope::Saved(saved)), f)
}

/// Runs `f`, whose operation computes what an enclosing [`checkpoint`] returns: the second run needs what leads to it, and not itself.
pub fn last<T>(f: impl FnOnce() -> T) -> T {
    in_scope(Some(Scope::Last), f)
}

fn in_scope<T>(scope: Option<Scope>, f: impl FnOnce() -> T) -> T {
    struct Restore(Option<Scope>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SCOPE.set(self.0);
        }
    }
    let _restore = Restore(SCOPE.replace(scope));
    f()
}

/// Computes the results of operation `op`, or takes them back where an enclosing [`checkpoint`] kept them in its first run.
pub fn keep(op: &str, compute: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    let saved = match SCOPE.get() {
        Some(Scope::Saved(saved)) if saved != Saved::Middle => saved,
        _ => return compute(),
    };
    let kept = RUN.with_borrow_mut(|run| match run {
        Some(Run::Second(policy, stowed)) if policy.fate(saved) != Fate::Recompute => Some(stowed.take(op)),
        _ => None,
    });
    if let Some(kept) = kept {
        return kept;
    }
    let results = in_scope(None, compute)?;
    RUN.with_borrow_mut(|run| match run {
        Some(Run::First(policy, stowed)) if policy.fate(saved) != Fate::Recompute => {
            stowed.put(op, &results, policy.fate(saved))
        }
        _ => Ok(()),
    })?;
    Ok(results)
}

/// A stand-in for a result that nobody reads, without memory of its own; none where it is read.
pub(crate) fn unread(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
    let unread = RUN.with_borrow(|run| match (run, SCOPE.get()) {
        (Some(Run::Second(..)), Some(Scope::Last)) => true,
        (Some(Run::Second(policy, _)), Some(Scope::Saved(Saved::Middle))) => {
            policy.fate(Saved::Middle) != Fate::Recompute
        }
        _ => false,
    });
    if !unread {
        return Ok(None);
    }
    Ok(Some(Tensor::zeros((), dtype, device)?.broadcast_as(shape)?))
}

/// Runs `f` keeping only its inputs and what `policy` names; backward runs it again.
///
/// `f` must do the same both times: randomness is a function of seed and place, so it does. Parameters that `f` uses by itself get their
/// gradients in the second run. What rests in the host's memory comes back while the checkpoint that was made after this one is in its backward.
///
/// # Errors
/// Where `f` fails, or its operations in the second run are not those of the first.
pub fn checkpoint(
    policy: Policy,
    inputs: &[&Value],
    f: impl Fn(&[Value]) -> Result<Vec<Value>> + Send + 'static,
) -> Result<Vec<Value>> {
    let constants = |tensors: &[Tensor]| tensors.iter().cloned().map(Value::constant).collect::<Vec<_>>();
    let tensors: Vec<Tensor> = inputs.iter().map(|v| v.tensor().clone()).collect();
    if !recording() {
        return f(&constants(&tensors));
    }
    let needs: Vec<bool> = inputs.iter().map(|v| v.requires_grad()).collect();
    let stowed = Stowed::of_inputs(&tensors, policy.fate(Saved::Input))?;
    let (outputs, run) = in_run(Run::First(policy, stowed), || no_grad(|| f(&constants(&tensors))));
    let outputs = outputs?.iter().map(|v| v.tensor().clone()).collect();
    drop(tensors);
    let stowed = Arc::new(Mutex::new(run.map(Run::stowed).unwrap_or_default()));
    let before = BEFORE.replace(Arc::downgrade(&stowed));
    if let Some(before) = before.upgrade() {
        // by now it has been copied, so that nothing waits
        before.lock().unwrap_or_else(PoisonError::into_inner).leave()?;
    }
    Ok(Value::record_if(true, outputs, inputs, move |grads| {
        let mut stowed = mem::take(&mut *stowed.lock().unwrap_or_else(PoisonError::into_inner));
        let tensors = stowed.take_inputs()?;
        if let Some(before) = before.upgrade() {
            before.lock().unwrap_or_else(PoisonError::into_inner).recall()?;
        }
        let leaves: Vec<Value> = tensors
            .into_iter()
            .zip(&needs)
            .map(|(t, &need)| if need { Value::variable(t) } else { Value::constant(t) })
            .collect();
        let (outputs, _) = in_run(Run::Second(policy, stowed), || with_recording(true, || f(&leaves)));
        let roots = outputs?.into_iter().zip(grads).filter_map(|(v, g)| Some((v, g?))).collect();
        gradients(roots, &leaves.iter().collect::<Vec<_>>())
    }))
}

impl Run {
    fn stowed(self) -> Stowed {
        match self {
            Self::First(_, stowed) | Self::Second(_, stowed) => stowed,
        }
    }
}

fn in_run<T>(run: Run, f: impl FnOnce() -> T) -> (T, Option<Run>) {
    struct Restore(Option<Run>);
    impl Drop for Restore {
        fn drop(&mut self) {
            RUN.set(self.0.take());
        }
    }
    let _restore = Restore(RUN.replace(Some(run)));
    let result = in_scope(None, f);
    (result, RUN.take())
}
