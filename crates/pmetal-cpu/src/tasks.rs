//! Work shared out to rayon's threads.

use std::sync::atomic::{AtomicUsize, Ordering};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let counts: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            pool.install(|| for_each_task(counts.len(), |i| _ = counts[i].fetch_add(1, Ordering::Relaxed)));
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }
}
