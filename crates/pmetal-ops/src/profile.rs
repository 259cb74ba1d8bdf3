//! Where time goes: calls, wall time and arithmetic of every operation, forward and backward apart.
//!
//! Operations open a span where they begin; the walk back opens one around each recorded operation. A thread that nobody asked to
//! watch itself pays for a look at a thread-local variable. On the CPU an operation has been computed when it returns, so that the wall time
//! of the calling thread is its time; on a GPU it has only been asked for.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

/// An operation, with the widths it leads from and to where they tell one use from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Op {
    name: &'static str,
    widths: Option<[usize; 2]>,
}

impl Op {
    /// What was recorded outside any operation: reshapes, a checkpoint's second run.
    const OTHER: Self = Self { name: "other", widths: None };
}

impl From<&'static str> for Op {
    fn from(name: &'static str) -> Self {
        Self { name, widths: None }
    }
}

impl From<(&'static str, [usize; 2])> for Op {
    fn from((name, widths): (&'static str, [usize; 2])) -> Self {
        Self { name, widths: Some(widths) }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.widths {
            Some([from, to]) => f.pad(&format!("{} {from} to {to}", self.name)),
            None => f.pad(self.name),
        }
    }
}

/// The direction an operation ran in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From inputs to outputs.
    Forward,
    /// From the gradients of outputs to those of inputs.
    Backward,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
        })
    }
}

/// What an operation cost in one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// How often it ran.
    pub calls: u64,
    /// Its time, without that of operations inside it.
    pub time: Duration,
    /// Floating-point operations of its products; 0 where it has none.
    pub flops: f64,
}

/// What a watched thread did.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Every operation, the costliest first.
    pub ops: Vec<(Op, Direction, Cost)>,
    /// From [`start`] to [`finish`].
    pub time: Duration,
}

struct Watch {
    started: Instant,
    costs: BTreeMap<(Op, Direction), Cost>,
    open: Vec<Open>,
}

/// A span that has not ended.
struct Open {
    op: Op,
    direction: Direction,
    started: Instant,
    /// Time of the spans inside it.
    inside: Duration,
    flops: f64,
}

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// Watches this thread's operations from now on.
pub fn start() {
    WATCH.set(Some(Watch { started: Instant::now(), costs: BTreeMap::new(), open: Vec::new() }));
}

/// What this thread's operations cost since [`start`], which must not be inside one of them. Nothing where there was no start.
pub fn finish() -> Profile {
    let Some(watch) = WATCH.take() else { return Profile::default() };
    let mut ops: Vec<_> = watch.costs.into_iter().map(|((op, direction), cost)| (op, direction, cost)).collect();
    ops.sort_by_key(|(_, _, cost)| std::cmp::Reverse(cost.time));
    Profile { ops, time: watch.started.elapsed() }
}

/// An operation that is running; it ends when this is dropped.
#[must_use]
pub(crate) struct Span {
    watched: bool,
}

/// Begins the forward of an operation.
pub(crate) fn span(op: impl Into<Op>) -> Span {
    open(op.into(), Direction::Forward)
}

/// Begins the backward of an operation.
pub(crate) fn backward_span(op: impl Into<Op>) -> Span {
    open(op.into(), Direction::Backward)
}

fn open(op: Op, direction: Direction) -> Span {
    let watched = WATCH.with_borrow_mut(|watch| {
        let Some(watch) = watch else { return false };
        watch.open.push(Open { op, direction, started: Instant::now(), inside: Duration::ZERO, flops: 0.0 });
        true
    });
    Span { watched }
}

/// The operation that is running, as the walk back will name it.
pub(crate) fn current() -> Op {
    WATCH.with_borrow(|watch| watch.as_ref()?.open.last().map(|open| open.op)).unwrap_or(Op::OTHER)
}

/// Adds floating-point operations to the running operation; `flops` is asked only on a watched thread.
pub(crate) fn work(flops: impl FnOnce() -> f64) {
    WATCH.with_borrow_mut(|watch| {
        if let Some(open) = watch.as_mut().and_then(|watch| watch.open.last_mut()) {
            open.flops += flops();
        }
    });
}

impl Drop for Span {
    fn drop(&mut self) {
        if !self.watched {
            return;
        }
        WATCH.with_borrow_mut(|watch| {
            let Some(watch) = watch else { return };
            let Some(Open { op, direction, started, inside, flops }) = watch.open.pop() else { return };
            let time = started.elapsed();
            if let Some(outer) = watch.open.last_mut() {
                outer.inside += time;
            }
            let cost = watch.costs.entry((op, direction)).or_default();
            cost.calls += 1;
            cost.time += time.saturating_sub(inside);
            cost.flops += flops;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Value, gradients, rms_norm, testing::random};

    #[test]
    fn spans_are_counted_without_those_inside_them() {
        start();
        {
            let _outer = span("outer");
            for _ in 0..2 {
                let _inner = span(("inner", [3, 4]));
                work(|| 5.0);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let profile = finish();
        let [(inner, _, cost), (outer, _, outer_cost)] = profile.ops[..] else { panic!("{profile:?}") };
        assert_eq!((inner.to_string(), outer.to_string()), ("inner 3 to 4".into(), "outer".into()));
        assert_eq!((cost.calls, cost.flops, outer_cost.calls, outer_cost.flops), (2, 10.0, 1, 0.0));
        assert!(cost.time >= Duration::from_millis(40) && cost.time + outer_cost.time <= profile.time);
    }

    #[test]
    fn the_walk_back_names_the_operation_that_recorded() {
        let [x, weight] = [Value::variable(random(&[2, 8], 1)), Value::constant(random(&[8], 2))];
        start();
        let y = rms_norm(&x, &weight, 1e-6).unwrap();
        let dy = y.tensor().ones_like().unwrap();
        gradients(vec![(y, dy)], &[&x]).unwrap();
        let profile = finish();
        let found = |direction| {
            let of_norm = |&&(op, d, _): &&(Op, Direction, Cost)| op == Op::from("rms_norm") && d == direction;
            profile.ops.iter().find(of_norm).map(|(_, _, cost)| cost.calls)
        };
        assert_eq!((found(Direction::Forward), found(Direction::Backward)), (Some(1), Some(1)));
    }

    #[test]
    fn an_unwatched_thread_has_no_profile() {
        drop(span("unseen"));
        work(|| unreachable!("nobody watches"));
        assert!(finish().ops.is_empty());
    }
}
