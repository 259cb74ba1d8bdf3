//! Walks over rows: vectors four at a time while there are so many, then one at a time, then single numbers.

use super::Vector;

/// What is done with elements `at..at + V::LANES`.
pub(crate) trait Step {
    fn step<V: Vector>(&mut self, at: usize);
}

/// Steps over `len` elements: four vectors at a time, then one, then single elements.
#[inline(always)]
pub(crate) fn sweep<V: Vector>(len: usize, step: &mut impl Step) {
    let mut at = 0;
    while at + 4 * V::LANES <= len {
        step.step::<[V; 4]>(at);
        at += 4 * V::LANES;
    }
    while at + V::LANES <= len {
        step.step::<V>(at);
        at += V::LANES;
    }
    while at < len {
        step.step::<f32>(at);
        at += 1;
    }
}

/// A number of the sum over a row.
pub(crate) trait Term {
    /// `sum` and what elements `at..at + V::LANES` add to it.
    fn add_to<V: Vector>(&mut self, at: usize, sum: V) -> V;
}

/// The sum of a term over `len` elements, in an order that depends on `len` alone.
#[inline(always)]
pub(crate) fn total<V: Vector>(len: usize, term: &mut impl Term) -> f32 {
    let mut quads = <[V; 4]>::splat(0.0);
    let mut at = 0;
    while at + 4 * V::LANES <= len {
        quads = term.add_to(at, quads);
        at += 4 * V::LANES;
    }
    let [a, b, c, d] = quads;
    let mut vectors = a.add(b).add(c.add(d));
    while at + V::LANES <= len {
        vectors = term.add_to(at, vectors);
        at += V::LANES;
    }
    let mut rest = 0.0f32;
    while at < len {
        rest = term.add_to(at, rest);
        at += 1;
    }
    vectors.sum() + rest
}
