//! Work shared out to rayon's threads.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How many threads kernels run on.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `task(i)` for every `i` below `count`, on rayon's threads unless there is only one.
///
/// Each thread takes the next task when it is done with one: threads that are held up do less.
pub(crate) fn for_each_task(count: usize, task: impl Fn(usize) + Send + Sync) {
    if count <= 1 {
        return (0..count).for_each(task);
    }
    let next = AtomicUsize::new(0);
    on_threads(threads().min(count), &|| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            task(i);
        }
    });
}

fn on_threads(count: usize, work: &(impl Fn() + Sync)) {
    if count <= 1 {
        return work();
    }
    rayon::join(|| on_threads(count - count / 2, work), || on_threads(count / 2, work));
}

/// How long [`keep_awake`] waits for the other threads to come.
const PATIENCE: Duration = Duration::from_micros(200);

/// Runs `f` while the other threads of the pool look for its work without ever going to sleep: waking them takes longer than the tasks
/// of a single token. For stretches of milliseconds, because idle threads keep their cores busy.
pub fn keep_awake<R>(f: impl FnOnce() -> R) -> R {
    let others = threads() - 1;
    if others == 0 || rayon::current_thread_index().is_none() {
        return f();
    }
    let (done, come) = (AtomicBool::new(false), AtomicUsize::new(0));
    let wait = || {
        come.fetch_add(1, Ordering::Relaxed);
        while !done.load(Ordering::Acquire) {
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                spin_loop();
            }
        }
    };
    rayon::in_place_scope(|scope| {
        let _done = Raise(&done);
        for _ in 0..others {
            scope.spawn(|_| wait());
        }
        // one that nobody has taken must not be taken by this thread while `f` waits for others
        let started = Instant::now();
        while come.load(Ordering::Relaxed) < others {
            if started.elapsed() > PATIENCE {
                done.store(true, Ordering::Release);
                break;
            }
            spin_loop();
        }
        f()
    })
}

/// Raises a flag at the end of a scope, also where that is left by a panic.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            let run = || for_each_task(counts.len(), |i| _ = counts[i].fetch_add(1, Ordering::Relaxed));
            pool.install(run);
            pool.install(|| keep_awake(run));
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 2));
        }
    }

    #[test]
    fn threads_that_are_busy_are_not_waited_for() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let stop = AtomicBool::new(false);
        pool.scope(|scope| {
            scope.spawn(|_| while !stop.load(Ordering::Relaxed) {});
            scope.spawn(|_| {
                assert_eq!(keep_awake(|| keep_awake(|| 7)), 7);
                stop.store(true, Ordering::Relaxed);
            });
        });
    }
}
