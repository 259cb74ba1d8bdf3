//! The allocator as the program's own: everything in this file's binary goes through it.

use std::sync::Mutex;

use pmetal_cpu::{PoolAllocator, live_bytes, peak_bytes, reset_peak};

#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

const MIB: usize = 1 << 20;

/// The counters belong to the process: one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> impl Drop {
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[test]
fn counts_what_lives_and_the_most_that_did() {
    let _guard = alone();
    let slack = MIB / 2;
    reset_peak();
    let before = live_bytes();
    let block = vec![1u8; 10 * MIB];
    assert!(live_bytes().abs_diff(before + 10 * MIB) < slack);
    let second = vec![2u8; 5 * MIB];
    drop(block);
    assert!(live_bytes().abs_diff(before + 5 * MIB) < slack);
    assert!(peak_bytes().abs_diff(before + 15 * MIB) < slack);
    drop(second);
    reset_peak();
    assert!(peak_bytes().abs_diff(before) < slack);
}

#[test]
fn a_freed_block_comes_back_and_zeroed_when_asked() {
    let _guard = alone();
    let mut block = vec![0xffu8; 8 * MIB];
    block[0] = 1;
    let address = block.as_ptr() as usize;
    drop(block);
    let zeroed = vec![0u8; 8 * MIB];
    assert_eq!(zeroed.as_ptr() as usize, address, "the kept block serves the next request");
    assert!(zeroed.iter().all(|&x| x == 0));
}

#[test]
fn blocks_of_other_sizes_share_what_a_freed_one_left() {
    let _guard = alone();
    let block = vec![1u8; 32 * MIB];
    let place = block.as_ptr_range();
    drop(block);
    let parts: Vec<Vec<u8>> = (1..6).map(|n| vec![n as u8; n * MIB + 12_345 * n]).collect();
    assert!(parts.iter().all(|part| place.contains(&part.as_ptr())));
    assert!(parts.iter().zip(1u8..).all(|(part, n)| part.iter().all(|&x| x == n)));
    drop(parts);
    let whole = vec![2u8; 32 * MIB];
    assert_eq!(whole.as_ptr(), place.start);
}

#[test]
fn growing_keeps_the_contents_across_classes() {
    let _guard = alone();
    let mut values: Vec<u32> = Vec::new();
    for i in 0..3_000_000u32 {
        values.push(i);
    }
    assert!(values.iter().enumerate().all(|(i, &x)| x == i as u32));
    values.truncate(50_000);
    values.shrink_to_fit();
    assert_eq!(values, (0..50_000).collect::<Vec<_>>());
    values.truncate(10);
    values.shrink_to_fit();
    assert_eq!(values, (0..10).collect::<Vec<_>>());
}

#[test]
fn threads_get_blocks_of_their_own() {
    let _guard = alone();
    let before = live_bytes();
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            std::thread::spawn(move || {
                for round in 0..200u64 {
                    let len = MIB / 8 + (pmetal_cpu::mix(thread, &[round]) % (MIB as u64 / 2)) as usize;
                    let mark = thread << 32 | round;
                    let first = vec![mark; len];
                    let second = vec![0u64; len / 2];
                    assert!(first.iter().all(|&x| x == mark) && second.iter().all(|&x| x == 0));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no thread saw another's block");
    }
    assert!(live_bytes().abs_diff(before) < MIB, "everything was given back");
}
