//! Where time goes: calls, time, arithmetic and bytes of every operation, forward and backward apart.
//!
//! Operations open a span where they begin; the walk back opens one around each recorded operation. A thread that nobody asked to
//! watch itself pays for a look at a thread-local variable. A span's begin and end are [`Marks`] of the device that computes: the host's
//! clock on a CPU, where an operation has been computed when it returns; points of the stream on a GPU, where it has only been asked for.
//! A GPU's time between two marks is that of what was asked between them, and of waiting for a host that asks too slowly.

use std::{cell::RefCell, collections::BTreeMap, fmt, time::Duration};

use candle_core::{Device, Tensor};
use pmetal_metal::{HostMarks, Marks};

use crate::{Result, place::gpu_of};

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
    /// Bytes that it must read and write at least; 0 where it does not say.
    pub bytes: f64,
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
    marks: Box<dyn Marks>,
    marked: usize,
    /// The first failure to mark.
    failed: Option<pmetal_metal::Error>,
    spans: Vec<Spanned>,
    /// Those of `spans` that have not ended, the innermost last.
    open: Vec<usize>,
}

/// A span that has begun; numbers are those of marks.
struct Spanned {
    op: Op,
    direction: Direction,
    begin: usize,
    end: usize,
    /// The one around it.
    outer: Option<usize>,
    flops: f64,
    bytes: f64,
}

impl Watch {
    fn mark(&mut self) -> usize {
        if let Err(error) = self.marks.mark() {
            self.failed.get_or_insert(error);
        }
        self.marked += 1;
        self.marked - 1
    }

    fn innermost(&mut self) -> Option<&mut Spanned> {
        self.open.last().map(|&span| &mut self.spans[span])
    }
}

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// Watches this thread's operations on `device` from now on.
///
/// # Errors
/// Where the device does not tell when it passes a point of its work.
pub fn start(device: &Device) -> Result<()> {
    let marks: Box<dyn Marks> = match gpu_of(device)? {
        Some(gpu) => gpu.marks()?,
        None => Box::new(HostMarks::default()),
    };
    let mut watch = Watch { marks, marked: 0, failed: None, spans: Vec::new(), open: Vec::new() };
    watch.mark();
    WATCH.set(Some(watch));
    Ok(())
}

/// Whether this thread is watched: its operations must then be asked for one by one, not as a graph.
pub fn watching() -> bool {
    WATCH.with_borrow(Option::is_some)
}

/// What this thread's operations cost since [`start`], which must not be inside one of them. Nothing where there was no start. Waits for
/// the device.
///
/// # Errors
/// Where the device failed.
pub fn finish() -> Result<Profile> {
    let Some(mut watch) = WATCH.take() else { return Ok(Profile::default()) };
    let last = watch.mark();
    if let Some(error) = watch.failed {
        return Err(error.into());
    }
    let passed = watch.marks.seconds()?;
    let took = |span: &Spanned| passed[span.end] - passed[span.begin];
    let mut own: Vec<f64> = watch.spans.iter().map(took).collect();
    for span in &watch.spans {
        if let Some(outer) = span.outer {
            own[outer] -= took(span);
        }
    }
    let mut costs = BTreeMap::<(Op, Direction), Cost>::new();
    for (span, own) in watch.spans.iter().zip(own) {
        let cost = costs.entry((span.op, span.direction)).or_default();
        cost.calls += 1;
        cost.time += Duration::from_secs_f64(own.max(0.0));
        cost.flops += span.flops;
        cost.bytes += span.bytes;
    }
    let mut ops: Vec<_> = costs.into_iter().map(|((op, direction), cost)| (op, direction, cost)).collect();
    ops.sort_by_key(|(_, _, cost)| std::cmp::Reverse(cost.time));
    Ok(Profile { ops, time: Duration::from_secs_f64(passed[last]) })
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
        let begin = watch.mark();
        let outer = watch.open.last().copied();
        watch.open.push(watch.spans.len());
        watch.spans.push(Spanned { op, direction, begin, end: begin, outer, flops: 0.0, bytes: 0.0 });
        true
    });
    Span { watched }
}

/// The operation that is running, as the walk back will name it.
pub(crate) fn current() -> Op {
    WATCH.with_borrow_mut(|watch| watch.as_mut()?.innermost().map(|span| span.op)).unwrap_or(Op::OTHER)
}

/// Adds floating-point operations to the running operation; `flops` is asked only on a watched thread.
pub(crate) fn work(flops: impl FnOnce() -> f64) {
    WATCH.with_borrow_mut(|watch| {
        if let Some(span) = watch.as_mut().and_then(Watch::innermost) {
            span.flops += flops();
        }
    });
}

/// Adds the bytes of tensors that the running operation reads or writes: each once for every time that it is named.
pub(crate) fn moved(tensors: &[&Tensor]) {
    traffic(|| tensors.iter().map(|t| (t.elem_count() * t.dtype().size_in_bytes()) as f64).sum());
}

/// Adds bytes that the running operation reads or writes; `bytes` is asked only on a watched thread.
pub(crate) fn traffic(bytes: impl FnOnce() -> f64) {
    WATCH.with_borrow_mut(|watch| {
        if let Some(span) = watch.as_mut().and_then(Watch::innermost) {
            span.bytes += bytes();
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
            let end = watch.mark();
            if let Some(span) = watch.open.pop() {
                watch.spans[span].end = end;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::{
        RmsNorm, Value, gradients, rms_norm,
        testing::{emulated, random},
    };

    #[test]
    fn spans_are_counted_without_those_inside_them() {
        start(&Device::Cpu).unwrap();
        {
            let _outer = span("outer");
            for _ in 0..2 {
                let _inner = span(("inner", [3, 4]));
                work(|| 5.0);
                moved(&[&random(&[2, 3], 1)]);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let profile = finish().unwrap();
        let [(inner, _, cost), (outer, _, outer_cost)] = profile.ops[..] else { panic!("{profile:?}") };
        assert_eq!((inner.to_string(), outer.to_string()), ("inner 3 to 4".into(), "outer".into()));
        assert_eq!((cost.calls, cost.flops, outer_cost.calls, outer_cost.flops), (2, 10.0, 1, 0.0));
        assert_eq!((cost.bytes, outer_cost.bytes), (2.0 * 6.0 * 8.0, 0.0));
        assert!(cost.time >= Duration::from_millis(40) && cost.time + outer_cost.time <= profile.time);
    }

    fn watched_norm() -> Profile {
        let wide = |t: Tensor| t.to_dtype(DType::F32).unwrap();
        let [x, weight] = [Value::variable(wide(random(&[2, 8], 1))), Value::constant(wide(random(&[8], 2)))];
        start(&Device::Cpu).unwrap();
        let y = rms_norm(&x, &weight, RmsNorm::new(1e-6), 0).unwrap();
        let dy = y.tensor().ones_like().unwrap();
        gradients(vec![(y, dy)], &[&x]).unwrap();
        finish().unwrap()
    }

    #[test]
    fn the_walk_back_names_the_operation_that_recorded() {
        for profile in [watched_norm(), emulated(watched_norm)] {
            let found = |direction| {
                let of_norm = |&&(op, d, _): &&(Op, Direction, Cost)| op == Op::from("rms_norm") && d == direction;
                profile.ops.iter().find(of_norm).map(|(_, _, cost)| cost.calls)
            };
            assert_eq!((found(Direction::Forward), found(Direction::Backward)), (Some(1), Some(1)));
            let inside: Duration = profile.ops.iter().map(|(_, _, cost)| cost.time).sum();
            assert!(inside > Duration::ZERO && inside <= profile.time, "{profile:?}");
        }
    }

    #[test]
    fn an_unwatched_thread_has_no_profile() {
        assert!(!watching());
        drop(span("unseen"));
        work(|| unreachable!("nobody watches"));
        traffic(|| unreachable!("nobody watches"));
        assert!(finish().unwrap().ops.is_empty());
    }
}
