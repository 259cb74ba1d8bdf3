use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError},
};

use candle_core::{Tensor, TensorId};

use super::{Node, Source, Value, with_recording};
use crate::{Error, Result, elementwise, profile::backward_span};

/// A gradient on its way, and whether it may be added to in place.
struct Grad {
    tensor: Tensor,
    shared: bool,
}

/// Nodes that wait for their turn, by creation order, with the gradients of their outputs so far.
type Pending = BTreeMap<u64, (Arc<Node>, Vec<Option<Grad>>)>;

/// Walks back from a scalar loss with gradient 1; the gradients of parameters are added to their arenas.
///
/// # Errors
/// Where `loss` is not a scalar, and where an operation's backward fails.
pub fn backward(loss: Value) -> Result<()> {
    if loss.tensor.elem_count() != 1 {
        return Err(Error::operand("backward", "loss", "a scalar", loss.tensor.dims()));
    }
    let one = loss.tensor.ones_like()?;
    ONE.set(Some(one.id()));
    gradients(vec![(loss, one)], &[]).map(drop)
}

thread_local! {
    /// The gradient that the last walk began with.
    static ONE: Cell<Option<TensorId>> = const { Cell::new(None) };
}

/// Whether a gradient is known to be 1: that of the loss itself.
pub(crate) fn is_one(grad: &Tensor) -> bool {
    ONE.get() == Some(grad.id())
}

/// Walks back from `roots` (values with the gradients that arrive at them) and returns the gradients of the leaves `wrt`, made by
/// [`Value::variable`]; `None` where nothing arrived. The gradients of parameters go to their arenas.
pub fn gradients(roots: Vec<(Value, Tensor)>, wrt: &[&Value]) -> Result<Vec<Option<Tensor>>> {
    let wanted: HashMap<u64, usize> = wrt
        .iter()
        .enumerate()
        .filter_map(|(i, v)| match &v.source {
            Source::Node(node, _) => Some((node.id, i)),
            _ => None,
        })
        .collect();
    let mut found: Vec<Option<Tensor>> = vec![None; wrt.len()];
    let mut pending = Pending::new();
    for (value, grad) in roots {
        deliver(&mut pending, value.source, Grad { tensor: grad, shared: true })?;
    }
    while let Some((id, (node, grads))) = pending.pop_last() {
        let grads: Vec<Option<Tensor>> = grads.into_iter().map(|g| g.map(|g| g.tensor)).collect();
        if let Some(&i) = wanted.get(&id) {
            found[i] = grads.into_iter().next().flatten();
            continue;
        }
        let recorded = node.recorded.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(recorded) = recorded else { continue };
        let span = backward_span(recorded.op);
        let input_grads = with_recording(false, || (recorded.backward)(grads))?;
        drop(span);
        let mut uses: HashMap<TensorId, usize> = HashMap::new();
        for grad in input_grads.iter().flatten() {
            *uses.entry(grad.id()).or_default() += 1;
        }
        for (source, grad) in recorded.inputs.into_iter().zip(input_grads) {
            let Some(tensor) = grad else { continue };
            let shared = uses[&tensor.id()] > 1;
            deliver(&mut pending, source, Grad { tensor, shared })?;
        }
    }
    Ok(found)
}

/// Moves a first gradient in, adds a later one.
fn deliver(pending: &mut Pending, source: Source, grad: Grad) -> Result<()> {
    match source {
        Source::Constant => Ok(()),
        Source::Param(param) => param.add_grad(&grad.tensor),
        Source::Node(node, output) => {
            let outputs = node.outputs;
            let (_, slots) = pending
                .entry(node.id)
                .or_insert_with(|| (node, std::iter::repeat_with(|| None).take(outputs).collect()));
            let slot = &mut slots[output];
            *slot = Some(match slot.take() {
                None => grad,
                Some(first) if !first.shared => {
                    elementwise::add_assign(&first.tensor, &grad.tensor)?;
                    first
                }
                Some(first) if !grad.shared => {
                    elementwise::add_assign(&grad.tensor, &first.tensor)?;
                    grad
                }
                Some(first) => Grad { tensor: (&first.tensor + &grad.tensor)?, shared: false },
            });
            Ok(())
        }
    }
}
