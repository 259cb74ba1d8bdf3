//! Damaged copies of every seed: the targets return, in time, and within the memory that the bytes account for.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use pmetal_fuzz::{Damage, Target, targets};
use pmetal_ops::memory::{PoolAllocator, live_bytes, peak_bytes, reset_peak};

/// Counts what lives. All of this file is one test, so that nothing else allocates meanwhile.
#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

/// Copies of each seed.
const COPIES: u64 = 250;
/// Beyond any work on a few kilobytes, on a machine that does other things too: a hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
}

fn seeds(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut seeds: Vec<_> = fs::read_dir(corpus().join(name))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{name} has no seed");
    seeds
}

/// Bytes a target may hold at a time for a file of `length` bytes: parsed forms of JSON take tens of bytes for each of the text's, and
/// regular expressions, read buffers and the model around a file their share whatever its length.
fn allowance(length: usize) -> usize {
    (48 << 20) + 96 * length
}

/// Runs a target on bytes; what it says, and the most memory it held.
fn measured(target: Target, bytes: &[u8]) -> (bool, usize) {
    let before = live_bytes();
    reset_peak();
    let taken = target.1(bytes);
    (taken, peak_bytes().saturating_sub(before))
}

#[test]
fn damaged_files_are_refused_in_time_and_within_memory() {
    let (done, news) = mpsc::channel();
    let worker = thread::spawn(move || {
        for target in targets() {
            for (path, seed) in seeds(target.0) {
                let (taken, _) = measured(target, &seed);
                assert!(taken, "{} is a good one", path.display());
                for round in 0..COPIES {
                    let bytes = Damage::new(round).copy(&seed);
                    done.send((path.clone(), round)).unwrap();
                    let (_, peak) = measured(target, &bytes);
                    assert!(
                        peak <= allowance(bytes.len()),
                        "{}, copy {round}: {peak} bytes of memory for {}",
                        path.display(),
                        bytes.len()
                    );
                }
            }
        }
    });
    let mut last = None;
    loop {
        match news.recv_timeout(PATIENCE) {
            Ok(place) => last = Some(place),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => panic!("{last:?} does not end"),
        }
    }
    assert!(worker.join().is_ok(), "{last:?} failed");
}
