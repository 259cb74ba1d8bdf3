//! One range of addresses from the system, whose pages become memory as they are first written to.

use std::ptr::{self, NonNull};

use super::heap::Unit;

/// Bytes of a unit: a multiple of the system's pages.
pub(super) const UNIT: usize = 16 << 10;

/// Addresses that are reserved, memory or not: what cannot be had is halved down to the least.
const MOST: usize = 1 << 40;
const LEAST: usize = 1 << 32;
/// The range begins where a huge page can.
const HUGE_PAGE: usize = 2 << 20;
/// The range becomes usable in steps of this size.
const STEP: usize = 64 << 20;

pub(super) struct Range {
    start: NonNull<u8>,
    len: usize,
    usable: usize,
}

// SAFETY: the range belongs to this value wherever it is.
unsafe impl Send for Range {}

impl Range {
    /// A range, and a table of its units. None where the system has neither.
    pub(super) fn reserve() -> Option<(Self, &'static mut [Unit])> {
        // SAFETY: reads a constant of the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if !usize::try_from(page).is_ok_and(|page| page > 0 && UNIT.is_multiple_of(page)) {
            return None;
        }
        let mut len = MOST;
        while len >= LEAST {
            if let Some(found) = Self::of(len) {
                return Some(found);
            }
            len /= 2;
        }
        None
    }

    fn of(len: usize) -> Option<(Self, &'static mut [Unit])> {
        let mapped = map(len + HUGE_PAGE, libc::PROT_NONE)?;
        let units = len / UNIT;
        let Some(table) = map(units * size_of::<Unit>(), libc::PROT_READ | libc::PROT_WRITE) else {
            // SAFETY: just mapped, and nobody knows of it.
            unsafe { libc::munmap(mapped.as_ptr().cast(), len + HUGE_PAGE) };
            return None;
        };
        // SAFETY: the mapping is longer than the range by a huge page.
        let start = unsafe { mapped.add(mapped.align_offset(HUGE_PAGE)) };
        // Fewer misses of the address cache, and one page fault instead of 512. Where the system does not have them, as well.
        #[cfg(target_os = "linux")]
        // SAFETY: advice on a mapping of ours changes no contents.
        unsafe {
            libc::madvise(start.as_ptr().cast(), len, libc::MADV_HUGEPAGE);
        }
        // SAFETY: mapped for good and ours alone; aligned as a page is; zero bytes are units.
        let table = unsafe { std::slice::from_raw_parts_mut(table.as_ptr().cast::<Unit>(), units) };
        Some((Self { start, len, usable: 0 }, table))
    }

    /// Makes the first `bytes` bytes usable, or says that the system refuses.
    pub(super) fn extend_to(&mut self, bytes: usize) -> bool {
        if bytes <= self.usable {
            return true;
        }
        let until = bytes.next_multiple_of(STEP).min(self.len);
        // SAFETY: the part lies in the range, and was of no use to anybody before.
        let refused = unsafe {
            let part = self.start.add(self.usable).as_ptr().cast();
            libc::mprotect(part, until - self.usable, libc::PROT_READ | libc::PROT_WRITE) != 0
        };
        if !refused {
            self.usable = until;
        }
        !refused
    }

    /// Gives memory back to the system; the addresses stay, and read as zeros.
    ///
    /// # Safety
    /// The bytes are usable, begin and end with units, and belong to nobody.
    pub(super) unsafe fn renew(&self, offset: usize, len: usize) -> bool {
        // SAFETY: the caller's promise; both calls replace the pages by empty ones.
        unsafe {
            let part = self.start.add(offset).as_ptr().cast();
            if cfg!(target_os = "linux") {
                return libc::madvise(part, len, libc::MADV_DONTNEED) == 0;
            }
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED;
            libc::mmap(part, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) != libc::MAP_FAILED
        }
    }

    /// Where a unit begins.
    pub(super) fn address(&self, unit: u32) -> *mut u8 {
        self.start.as_ptr().wrapping_add(unit as usize * UNIT)
    }

    /// The unit that begins at an address; none where it is not of this range.
    pub(super) fn unit_at(&self, address: *const u8) -> Option<u32> {
        let offset = address.addr().checked_sub(self.start.addr().get())?;
        (offset < self.len).then_some((offset / UNIT) as u32)
    }
}

fn map(len: usize, protection: i32) -> Option<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, of no file, where the system likes.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
}
