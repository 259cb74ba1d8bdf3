//! A global allocator that keeps large blocks for reuse and counts what lives.
//!
//! Tensors on the CPU are vectors that come and go with every operation. The system's allocator gives large blocks back
//! to the kernel at once, so that each new tensor is page faults first; here freed blocks of a mebibyte and more wait in
//! lists, one per size class, for the next request.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};

/// Blocks from this size on are kept.
const SMALLEST: usize = 1 << 20;
/// Size classes per power of two: rounding up to one wastes at most an eighth.
const STEPS: usize = 8;
const CLASSES: usize = (usize::BITS as usize - 20) * STEPS;
/// Every kept block has this alignment; requests for more go to the system.
const ALIGNMENT: usize = 64;

/// The allocator, to be installed with `#[global_allocator]`.
///
/// Blocks in use and blocks kept together stay within five quarters of the most that was ever in use at a time: a request
/// that would go beyond gives kept blocks back to the system first.
pub struct PoolAllocator;

static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);
static KEPT: AtomicUsize = AtomicUsize::new(0);
static LISTS: [List; CLASSES] = [const { List::new() }; CLASSES];

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

/// Gives every kept block back to the system.
pub fn trim() {
    release_until(|| false);
}

/// Frees kept blocks, the largest first, until `enough` or none is left.
fn release_until(enough: impl Fn() -> bool) {
    for (class, list) in LISTS.iter().enumerate().rev() {
        while !enough() {
            let Some(block) = list.pop() else { break };
            KEPT.fetch_sub(class_size(class), Ordering::Relaxed);
            // SAFETY: blocks in the list of a class were allocated with the layout of the class and belong to nobody.
            unsafe { System.dealloc(block, class_layout(class)) };
        }
    }
}

/// The freed blocks of one size, linked through their first word. The lock is held for a few instructions, and no code of
/// the standard library runs inside an allocator that might allocate itself.
struct List {
    locked: AtomicBool,
    head: UnsafeCell<*mut u8>,
}

// SAFETY: `head` and the links are only touched between `lock` and its release.
unsafe impl Sync for List {}

impl List {
    const fn new() -> Self {
        Self { locked: AtomicBool::new(false), head: UnsafeCell::new(ptr::null_mut()) }
    }

    fn with_head<R>(&self, f: impl FnOnce(&mut *mut u8) -> R) -> R {
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            spin_loop();
        }
        // SAFETY: the lock is held, so this is the only reference.
        let result = f(unsafe { &mut *self.head.get() });
        self.locked.store(false, Ordering::Release);
        result
    }

    fn pop(&self) -> Option<*mut u8> {
        self.with_head(|head| {
            let block = *head;
            if block.is_null() {
                return None;
            }
            // SAFETY: a block in the list is ours, at least a word long and aligned; `push` wrote its link.
            *head = unsafe { block.cast::<*mut u8>().read() };
            Some(block)
        })
    }

    /// # Safety
    /// `block` belongs to the caller, who gives it up, and has the size of this list's class.
    unsafe fn push(&self, block: *mut u8) {
        self.with_head(|head| {
            // SAFETY: the caller gives the block up; it is longer than a word and aligned.
            unsafe { block.cast::<*mut u8>().write(*head) };
            *head = block;
        });
    }
}

/// The class that serves a request, or none where the system does.
fn class_of(layout: Layout) -> Option<usize> {
    let size = layout.size();
    if size < SMALLEST || layout.align() > ALIGNMENT {
        return None;
    }
    let octave = size.ilog2() as usize;
    let step = (1usize << octave) / STEPS;
    let steps = (size - (1 << octave)).div_ceil(step);
    let class = (octave - SMALLEST.ilog2() as usize) * STEPS + steps;
    (class < CLASSES - STEPS).then_some(class)
}

/// Bytes of the blocks of a class.
fn class_size(class: usize) -> usize {
    let octave = SMALLEST << (class / STEPS);
    octave + octave / STEPS * (class % STEPS)
}

fn class_layout(class: usize) -> Layout {
    // SAFETY: the alignment is a power of two, and sizes of classes that `class_of` returns are far below the limit:
    // a `Layout` of at least seven eighths of them existed.
    unsafe { Layout::from_size_align_unchecked(class_size(class), ALIGNMENT) }
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
    /// A block for the request, and whether it is one that was used before.
    fn take(layout: Layout, fresh: impl Fn(Layout) -> *mut u8) -> (*mut u8, bool) {
        let Some(class) = class_of(layout) else {
            return (fresh(layout), false);
        };
        if let Some(block) = LISTS[class].pop() {
            KEPT.fetch_sub(class_size(class), Ordering::Relaxed);
            return (block, true);
        }
        let wanted = live_bytes() + class_size(class);
        let most = peak_bytes().max(wanted);
        let most = most + most / 4;
        release_until(|| wanted + KEPT.load(Ordering::Relaxed) <= most);
        let mut block = fresh(class_layout(class));
        if block.is_null() {
            trim();
            block = fresh(class_layout(class));
        }
        (block, false)
    }
}

// SAFETY: blocks come from `System` with the layout asked for or, for a class, with at least its size and alignment, and
// go back with the layout they came with, because the class is a function of the layout that the caller repeats.
unsafe impl GlobalAlloc for PoolAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the size is not zero, by the caller's promise.
        let (block, _) = Self::take(layout, |layout| unsafe { System.alloc(layout) });
        if !block.is_null() {
            count(layout.size() as isize);
        }
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let (block, used) = Self::take(layout, |layout| unsafe { System.alloc_zeroed(layout) });
        if used {
            // SAFETY: the block is at least as long as the request.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        if !block.is_null() {
            count(layout.size() as isize);
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        match class_of(layout) {
            // SAFETY: the caller gives the block up; it came from `take` with the same layout, hence the same class.
            Some(class) => unsafe {
                KEPT.fetch_add(class_size(class), Ordering::Relaxed);
                LISTS[class].push(block);
            },
            // SAFETY: it came from `System` with this layout.
            None => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the new size, rounded up to the alignment, does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        let (old, new) = (class_of(layout), class_of(new_layout));
        if old.is_none() && new.is_none() {
            // SAFETY: the block came from `System` with this layout.
            let moved = unsafe { System.realloc(block, layout, new_size) };
            if !moved.is_null() {
                count(new_size as isize - layout.size() as isize);
            }
            return moved;
        }
        if old == new {
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
