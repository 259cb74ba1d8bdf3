//! A global allocator that keeps the memory of large blocks and counts what lives.
//!
//! Tensors on the CPU are vectors that come and go with every operation. The system's allocator gives large blocks back
//! to the kernel at once, so that each new tensor is page faults first. Here blocks of 16 KiB and more come from one range of
//! addresses, in huge pages where the system has them; what is freed there joins its free neighbours and serves the next requests.

mod heap;
#[cfg_attr(not(all(unix, target_pointer_width = "64")), path = "alloc/no_range.rs")]
mod range;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

use heap::Heap;
use range::{Range, UNIT};

/// Blocks from this size on are the pool's.
const SMALLEST: usize = UNIT;

/// The allocator, to be installed with `#[global_allocator]`.
///
/// Memory in use and memory kept together stay within five quarters of the most that was ever in use at a time: before more is
/// taken from the system, what is kept beyond that goes back to it.
pub struct PoolAllocator;

static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);
static POOL: Locked<Pool> = Locked::new(Pool { heap: Heap::new(&mut []), range: None, started: false, most: 0 });

/// Bytes in use, as requested, up to 64 KiB a thread; zero while [`PoolAllocator`] is not the program's allocator.
pub fn live_bytes() -> usize {
    // what one thread took another may give back and tell first
    LIVE.load(Ordering::Relaxed).max(0).unsigned_abs()
}

/// The most bytes in use at a time since the start or the last [`reset_peak`].
pub fn peak_bytes() -> usize {
    PEAK.load(Ordering::Relaxed).max(0).unsigned_abs()
}

/// Starts a new measurement of the peak at what is in use now.
pub fn reset_peak() {
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// A value behind a lock that is held for a microsecond: no code of the standard library runs inside an allocator that might
/// allocate itself.
struct Locked<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only touched by the thread that holds the lock.
unsafe impl<T: Send> Sync for Locked<T> {}

impl<T> Locked<T> {
    const fn new(value: T) -> Self {
        Self { locked: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let mut tries = 0u32;
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            tries = tries.wrapping_add(1);
            // the holder may wait for this very core
            if tries.is_multiple_of(256) { std::thread::yield_now() } else { spin_loop() }
        }
        // SAFETY: the lock is held, so this is the only reference.
        let result = f(unsafe { &mut *self.value.get() });
        self.locked.store(false, Ordering::Release);
        result
    }
}

struct Pool {
    heap: Heap<'static>,
    /// None before the start, and where the system has none.
    range: Option<Range>,
    started: bool,
    /// The most units that were in use at a time.
    most: u32,
}

impl Pool {
    /// A block of so many units, and whether it reads as zeros; none where the system has to serve it.
    fn take(&mut self, units: u32) -> Option<(*mut u8, bool)> {
        if !self.started {
            self.started = true;
            if let Some((range, table)) = Range::reserve() {
                (self.range, self.heap) = (Some(range), Heap::new(table));
            }
        }
        let range = self.range.as_mut()?;
        let found = match self.heap.take(units) {
            Some(found) => found,
            None => {
                let end = self.heap.end_with(units)?;
                keep_within(&mut self.heap, range, units, self.most);
                if !range.extend_to(end as usize * UNIT) {
                    return None;
                }
                self.heap.grow(units)
            }
        };
        self.most = self.most.max(self.heap.usage().0);
        Some((range.address(found.0), found.1))
    }

    /// The unit that a block of the pool begins with; none where the system served it.
    fn unit_at(&self, block: *const u8) -> Option<u32> {
        self.range.as_ref()?.unit_at(block)
    }
}

/// Gives memory back to the system until so many units more stay within five quarters of the most that were in use.
fn keep_within(heap: &mut Heap, range: &Range, units: u32, most: u32) {
    loop {
        let (taken, dirty) = heap.usage();
        let most = most.max(taken + units);
        if taken + units + dirty <= most + most / 4 {
            return;
        }
        let Some((first, len)) = heap.long_dirty_run() else { return };
        // SAFETY: the run is free, and the heap's runs are usable.
        if !unsafe { range.renew(first as usize * UNIT, len as usize * UNIT) } {
            return;
        }
        heap.cleaned(first);
    }
}

/// The units of a block that the pool serves; none where the system does.
fn units_of(layout: Layout) -> Option<u32> {
    let pooled = layout.size() >= SMALLEST && layout.align() <= UNIT;
    u32::try_from(layout.size().div_ceil(UNIT)).ok().filter(|_| pooled)
}

/// Bytes a thread counts by itself before it tells: counters that all threads write to for every small block would cost more than the
/// blocks.
const UNTOLD: isize = 1 << 16;

thread_local! {
    /// Bytes taken less bytes given back, not yet in [`LIVE`]. Without a destructor: it is used until the thread's very end.
    static OWN: Cell<isize> = const { Cell::new(0) };
}

/// Counts bytes that were taken (above 0) or given back.
fn count(bytes: isize) {
    let untold = OWN.get() + bytes;
    if untold.unsigned_abs() < UNTOLD.unsigned_abs() {
        OWN.set(untold);
        return;
    }
    OWN.set(0);
    let live = LIVE.fetch_add(untold, Ordering::Relaxed) + untold;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

impl PoolAllocator {
    /// A block of the pool, and whether it reads as zeros.
    fn pooled(layout: Layout) -> Option<(*mut u8, bool)> {
        let units = units_of(layout)?;
        POOL.with(|pool| pool.take(units))
    }

    /// Shortens a block of the pool where it lies, or says that it has to move.
    fn fits_in_place(block: *mut u8, layout: Layout, new_layout: Layout) -> bool {
        let (Some(_), Some(units)) = (units_of(layout), units_of(new_layout)) else { return false };
        POOL.with(|pool| {
            let Some(first) = pool.unit_at(block).filter(|&first| units <= pool.heap.len_of(first)) else {
                return false;
            };
            pool.heap.shorten(first, units);
            true
        })
    }
}

// SAFETY: the pool's blocks begin with a unit, whose alignment no pooled layout exceeds, are at least as long as asked for, apart from each
// other and usable until they are given back; all others are `System`'s. Where a block came from is told by its address.
unsafe impl GlobalAlloc for PoolAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let block = match Self::pooled(layout) {
            Some((block, _)) => block,
            // SAFETY: the size is not zero, by the caller's promise.
            None => unsafe { System.alloc(layout) },
        };
        if !block.is_null() {
            count(layout.size() as isize);
        }
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let block = match Self::pooled(layout) {
            Some((block, true)) => block,
            Some((block, false)) => {
                // SAFETY: the block is at least as long as the request.
                unsafe { block.write_bytes(0, layout.size()) };
                block
            }
            // SAFETY: as in `alloc`.
            None => unsafe { System.alloc_zeroed(layout) },
        };
        if !block.is_null() {
            count(layout.size() as isize);
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        let given = units_of(layout).is_some()
            && POOL.with(|pool| pool.unit_at(block).map(|first| pool.heap.give(first)).is_some());
        if !given {
            // SAFETY: the caller gives the block up; it is none of the pool's, hence came from `System` with this layout.
            unsafe { System.dealloc(block, layout) };
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the new size, rounded up to the alignment, does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if units_of(layout).is_none() && units_of(new_layout).is_none() {
            // SAFETY: the block came from `System` with this layout.
            let moved = unsafe { System.realloc(block, layout, new_size) };
            if !moved.is_null() {
                count(new_size as isize - layout.size() as isize);
            }
            return moved;
        }
        if Self::fits_in_place(block, layout, new_layout) {
            count(new_size as isize - layout.size() as isize);
            return block;
        }
        // SAFETY: both layouts are valid; the blocks are distinct and hold at least the bytes copied.
        unsafe {
            let moved = self.alloc(new_layout);
            if !moved.is_null() {
                ptr::copy_nonoverlapping(block, moved, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}
