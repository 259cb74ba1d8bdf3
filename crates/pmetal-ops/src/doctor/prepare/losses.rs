//! Logits, and losses of them.

use super::{prepared, weight};
use crate::{
    LogitsSpec, Result, Value, Weight,
    doctor::checks::{Prepared, Run, Size},
    linear_cross_entropy, logits, no_grad,
};

/// The vocabulary of checks of the loss.
fn vocabulary(rows: usize) -> usize {
    (2 * rows).max(37)
}

/// A label for each token; of an odd number of tokens some are not counted.
fn labels(rows: usize) -> Vec<i64> {
    let vocab = vocabulary(rows);
    (0..rows).map(|t| if rows % 2 == 1 && t % 3 == 1 { -100 } else { (t * 7 % vocab) as i64 }).collect()
}

/// Logits with a factor and a cap.
const CAPPED: LogitsSpec = LogitsSpec { scale: 1.5, softcap: Some(2.0) };

pub(in crate::doctor) fn loss(run: &Run, size: Size) -> Result<Prepared> {
    loss_of(LogitsSpec::default(), run, size)
}

pub(in crate::doctor) fn capped_loss(run: &Run, size: Size) -> Result<Prepared> {
    loss_of(CAPPED, run, size)
}

fn loss_of(spec: LogitsSpec, run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let arena = run.arena(&[("head", &[vocabulary(rows), width])])?;
    let (head, labels) = (weight(&arena, "head")?, labels(rows));
    let forward = move |v: &[Value]| {
        let found = linear_cross_entropy(&v[0], &head, &labels, 1.0 / labels.len() as f32, spec)?;
        Ok(vec![found.loss, Value::constant(found.token_losses)])
    };
    Ok(Prepared { leaves: run.variables(&[&[rows, width]])?, arena: Some(arena), forward: Box::new(forward) })
}

pub(in crate::doctor) fn losses(run: &Run, size: Size) -> Result<Prepared> {
    losses_of(LogitsSpec::default(), run, size)
}

pub(in crate::doctor) fn capped_losses(run: &Run, size: Size) -> Result<Prepared> {
    losses_of(CAPPED, run, size)
}

fn losses_of(spec: LogitsSpec, run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let head = Weight::Frozen(run.tensor(&[vocabulary(rows), width], 2)?);
    let (hidden, labels) = (Value::constant(run.tensor(&[rows, width], 1)?), labels(rows));
    prepared(vec![], move |_| {
        let found = no_grad(|| linear_cross_entropy(&hidden, &head, &labels, 1.0 / labels.len() as f32, spec))?;
        Ok(vec![found.loss, Value::constant(found.token_losses)])
    })
}

pub(in crate::doctor) fn head(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (hidden, head) = (run.tensor(&[rows, width], 1)?, run.tensor(&[vocabulary(rows), width], 2)?);
    let is_reference = run.is_reference();
    prepared(vec![], move |_| {
        let y = if is_reference {
            hidden.matmul(&head.t()?)?
        } else {
            logits(&hidden, &Weight::Frozen(head.clone()), LogitsSpec::default())?
        };
        Ok(vec![Value::constant(y)])
    })
}
