//! Cross-entropy of rows of logits, with and without the gradient, and the cap on logits.

use rayon::prelude::*;

use crate::vector::{Body, Step, Term, Vector, run, sweep, total};

/// Replaces every row of logits by its gradient and writes its loss.
///
/// `logits` is `[rows, vocab]`, `labels` and `losses` are `[rows]`. With `p = softmax(row)`: the loss is
/// `-ln p[label]` and the row becomes `grad_scale * (p - onehot(label))`. A negative label means ignored: loss and
/// gradient are zero. Where the logits went through [`softcap`] with `cap`, the gradient is that of what they were before.
pub fn cross_entropy_rows(
    logits: &mut [f32],
    vocab: usize,
    labels: &[i64],
    grad_scale: f32,
    cap: Option<f32>,
    losses: &mut [f32],
) {
    check("cross_entropy_rows", logits.len(), vocab, labels, losses.len());
    logits.par_chunks_exact_mut(vocab).zip(labels).zip(losses).for_each(|((row, &label), loss)| {
        let Ok(label) = usize::try_from(label) else {
            row.fill(0.0);
            *loss = 0.0;
            return;
        };
        let found = run(Statistics { row });
        let target = row[label];
        *loss = found.loss(target);
        let (max, factor) = (found.max, grad_scale / found.sum);
        match cap {
            None => {
                run(InPlace { row, max, factor });
                row[label] -= grad_scale;
            }
            Some(cap) => {
                run(InPlaceCapped { row, max, factor, inverse_cap: 1.0 / cap });
                row[label] -= grad_scale * slope(target * (1.0 / cap));
            }
        }
    });
}

/// Replaces every number by `cap * tanh(x / cap)`.
pub fn softcap(x: &mut [f32], cap: f32) {
    x.par_chunks_mut(CAPPED_AT_A_TIME).for_each(|x| run(Capped { x, cap, inverse_cap: 1.0 / cap }));
}

/// Enough that handing them out costs nothing beside them.
const CAPPED_AT_A_TIME: usize = 1 << 14;

/// The slope of [`softcap`] where the result is `share` of the cap.
#[inline(always)]
fn slope<V: Vector>(share: V) -> V {
    let one = V::splat(1.0);
    one.add(share).mul(one.sub(share))
}

/// The losses alone; the logits stay as they are. Shapes and meaning as in [`cross_entropy_rows`].
pub fn cross_entropy_losses(logits: &[f32], vocab: usize, labels: &[i64], losses: &mut [f32]) {
    check("cross_entropy_losses", logits.len(), vocab, labels, losses.len());
    logits.par_chunks_exact(vocab).zip(labels).zip(losses).for_each(|((row, &label), loss)| {
        *loss = usize::try_from(label).map_or(0.0, |label| run(Statistics { row }).loss(row[label]));
    });
}

/// What a softmax needs to know of a row.
struct Found {
    /// The largest number.
    max: f32,
    /// The sum of `e^(x - max)`.
    sum: f32,
}

impl Found {
    /// `-ln p` of the element that is `target`.
    fn loss(&self, target: f32) -> f32 {
        self.sum.ln() + (self.max - target)
    }
}

/// Elements whose maximum is found before their exponentials are summed: they stay in the first cache in between, so that a row is read
/// once from where it lies.
const BLOCK: usize = 2048;

struct Statistics<'a> {
    row: &'a [f32],
}

impl Body for Statistics<'_> {
    type Output = Found;

    #[inline(always)]
    fn run<V: Vector>(self) -> Found {
        // not minus infinity, from which nothing can be subtracted
        let (mut max, mut sum) = (f32::MIN, 0.0);
        for x in self.row.chunks(BLOCK) {
            let larger = Vector::max(max, largest::<V>(x));
            sum = sum * (max - larger).exp() + total::<V>(x.len(), &mut Exponentials { x, max: larger });
            max = larger;
        }
        Found { max, sum }
    }
}

/// The largest number, any NaN aside (the sum of exponentials brings it back).
#[inline(always)]
fn largest<V: Vector>(x: &[f32]) -> f32 {
    let mut largest = <[V; 4]>::splat(f32::NEG_INFINITY);
    let chunks = x.chunks_exact(4 * V::LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        largest = largest.max(Vector::load(chunk));
    }
    let mut largest = largest.largest();
    for &x in rest {
        largest = Vector::max(largest, x);
    }
    largest
}

struct Exponentials<'a> {
    x: &'a [f32],
    max: f32,
}

impl Term for Exponentials<'_> {
    #[inline(always)]
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V {
        sum.add(V::load(&self.x[at..]).sub(V::splat(self.max)).exp())
    }
}

/// Turns logits into `e^(x - max) * factor`.
struct InPlace<'a> {
    row: &'a mut [f32],
    max: f32,
    factor: f32,
}

impl Body for InPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        sweep::<V>(self.row.len(), &mut self);
    }
}

impl Step for InPlace<'_> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let exponential = V::load(&self.row[at..]).sub(V::splat(self.max)).exp();
        exponential.mul(V::splat(self.factor)).store(&mut self.row[at..]);
    }
}

/// Turns capped logits `x` into `e^(x - max) * factor * slope`.
struct InPlaceCapped<'a> {
    row: &'a mut [f32],
    max: f32,
    factor: f32,
    inverse_cap: f32,
}

impl Body for InPlaceCapped<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        sweep::<V>(self.row.len(), &mut self);
    }
}

impl Step for InPlaceCapped<'_> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let x = V::load(&self.row[at..]);
        let exponential = x.sub(V::splat(self.max)).exp().mul(V::splat(self.factor));
        exponential.mul(slope(x.mul(V::splat(self.inverse_cap)))).store(&mut self.row[at..]);
    }
}

struct Capped<'a> {
    x: &'a mut [f32],
    cap: f32,
    inverse_cap: f32,
}

impl Body for Capped<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        sweep::<V>(self.x.len(), &mut self);
    }
}

impl Step for Capped<'_> {
    #[inline(always)]
    fn step<V: Vector>(&mut self, at: usize) {
        let share = V::load(&self.x[at..]).mul(V::splat(self.inverse_cap)).tanh();
        share.mul(V::splat(self.cap)).store(&mut self.x[at..]);
    }
}

fn check(name: &str, len: usize, vocab: usize, labels: &[i64], losses: usize) {
    assert!(vocab > 0 && len == labels.len() * vocab, "{name}: {len} logits, {} labels, vocab {vocab}", labels.len());
    assert_eq!(losses, labels.len(), "{name}: losses");
    assert!(labels.iter().all(|&label| label < vocab as i64), "{name}: a label is not below {vocab}");
}
