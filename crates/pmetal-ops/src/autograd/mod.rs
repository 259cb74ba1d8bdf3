//! Values, the graph behind them, and the walk back through it.
//!
//! A [`Value`] is a tensor and, when a gradient must flow, the node that made it. [`backward`] visits nodes in reverse
//! creation order, moves a node's first gradient in, adds later ones in place, and drops what a node saved as soon as it has run.

mod checkpoint;
mod composite;
mod engine;
#[cfg(test)]
mod tests;

use std::{
    cell::Cell,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::Tensor;

pub(crate) use checkpoint::unread;
pub use checkpoint::{Fate, Policy, Saved, checkpoint, keep, last, saved};
pub use composite::composite;
pub(crate) use engine::is_one;
pub use engine::{backward, gradients};

use crate::{Param, Result, profile, rows::GradPlace};

/// Turns the gradients of a node's outputs into those of its inputs. `None` stands for zero on both sides.
///
/// Where one gradient goes to several inputs, return clones of one tensor, so that the walk knows not to add to it in place.
type BackwardFn = Box<dyn FnOnce(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + Send>;

/// A tensor that may remember how it was made.
#[derive(Clone)]
pub struct Value {
    tensor: Tensor,
    source: Source,
    /// The contiguous tensor that this one is the first columns of.
    spare: Option<Tensor>,
    grad_place: GradPlace,
}

#[derive(Clone)]
enum Source {
    Constant,
    Node(Arc<Node>, usize),
    Param(Param),
}

/// One recorded operation.
struct Node {
    /// Creation order.
    id: u64,
    outputs: usize,
    /// Emptied by the walk, so that saved tensors go as early as possible.
    recorded: Mutex<Option<Recorded>>,
}

struct Recorded {
    op: profile::Op,
    inputs: Vec<Source>,
    backward: BackwardFn,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

impl Value {
    /// A tensor no gradient flows to.
    pub fn constant(tensor: Tensor) -> Self {
        Self::new(tensor, Source::Constant)
    }

    fn new(tensor: Tensor, source: Source) -> Self {
        Self { tensor, source, spare: None, grad_place: GradPlace::default() }
    }

    /// This value as the first columns of `parent`, the same memory, whose other columns are free.
    pub(crate) fn with_spare(self, parent: Tensor) -> Self {
        Self { spare: Some(parent), ..self }
    }

    /// `[rows, width + spare]`, where there are free columns behind the rows.
    pub(crate) fn spare(&self) -> Option<&Tensor> {
        self.spare.as_ref()
    }

    /// This value with a place for its gradient.
    pub(crate) fn with_grad_place(self, grad_place: GradPlace) -> Self {
        Self { grad_place, ..self }
    }

    /// Where this value's gradient is best written: ask in the forward, write in the backward.
    pub(crate) fn grad_place(&self) -> GradPlace {
        self.grad_place.clone()
    }

    /// A leaf whose gradient [`gradients`] can return.
    pub fn variable(tensor: Tensor) -> Self {
        let node = Arc::new(Node { id: next_id(), outputs: 1, recorded: Mutex::new(None) });
        Self::new(tensor, Source::Node(node, 0))
    }

    /// The value of a trainable parameter; its gradient goes to the parameter's arena.
    pub fn param(param: &Param) -> Self {
        Self::new(param.value().clone(), Source::Param(param.clone()))
    }

    /// The outputs of an operation on `inputs`, with the function that takes gradients back.
    ///
    /// Nothing is recorded where no input needs a gradient or inside [`no_grad`].
    pub fn record(
        outputs: Vec<Tensor>,
        inputs: &[&Value],
        backward: impl FnOnce(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + Send + 'static,
    ) -> Vec<Self> {
        if !inputs.iter().any(|v| v.requires_grad()) {
            return outputs.into_iter().map(Self::constant).collect();
        }
        Self::record_always(outputs, inputs, backward)
    }

    /// As [`Value::record`], for an operation that also feeds the gradients of parameters it holds itself.
    pub(crate) fn record_if(
        needed: bool,
        outputs: Vec<Tensor>,
        inputs: &[&Value],
        backward: impl FnOnce(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + Send + 'static,
    ) -> Vec<Self> {
        if needed && recording() {
            return Self::record_always(outputs, inputs, backward);
        }
        Self::record(outputs, inputs, backward)
    }

    fn record_always(
        outputs: Vec<Tensor>,
        inputs: &[&Value],
        backward: impl FnOnce(Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> + Send + 'static,
    ) -> Vec<Self> {
        let recorded = Recorded {
            op: profile::current(),
            inputs: inputs.iter().map(|v| v.source.clone()).collect(),
            backward: Box::new(backward),
        };
        let node = Arc::new(Node { id: next_id(), outputs: outputs.len(), recorded: Mutex::new(Some(recorded)) });
        outputs.into_iter().enumerate().map(|(i, tensor)| Self::new(tensor, Source::Node(node.clone(), i))).collect()
    }

    /// The tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient flows here now: false for constants, and for everything inside [`no_grad`].
    pub fn requires_grad(&self) -> bool {
        recording() && !matches!(self.source, Source::Constant)
    }

    /// The same numbers under another shape.
    pub fn reshape<S: Into<candle_core::Shape>>(&self, shape: S) -> Result<Self> {
        let before = self.tensor.shape().clone();
        let tensor = self.tensor.reshape(shape)?;
        Ok(one(Self::record(vec![tensor], &[self], move |grads| {
            let dy = grads.into_iter().next().flatten();
            Ok(vec![dy.map(|dy| dy.reshape(before)).transpose()?])
        })))
    }
}

/// Runs `f` without recording anything: evaluation, generation.
pub fn no_grad<T>(f: impl FnOnce() -> T) -> T {
    with_recording(false, f)
}

fn with_recording<T>(on: bool, f: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.set(self.0);
        }
    }
    let _restore = Restore(RECORDING.replace(on));
    f()
}

pub(crate) fn recording() -> bool {
    RECORDING.get()
}

fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// The only output of a single-output operation.
pub(crate) fn one(mut outputs: Vec<Value>) -> Value {
    debug_assert_eq!(outputs.len(), 1);
    outputs.swap_remove(0)
}

/// The gradient of the only output of a single-output operation; the walk never calls a node without one.
pub(crate) fn only(grads: Vec<Option<Tensor>>, op: &'static str) -> Result<Tensor> {
    grads
        .into_iter()
        .next()
        .flatten()
        .ok_or_else(|| crate::Error::Lengths { op, reason: "backward was called without a gradient".into() })
}
