//! Where there is no range of addresses to reserve: everything goes to the system's allocator.

use super::heap::Unit;

pub(super) const UNIT: usize = 16 << 10;

pub(super) enum Range {}

impl Range {
    pub(super) fn reserve() -> Option<(Self, &'static mut [Unit])> {
        None
    }

    pub(super) fn extend_to(&mut self, _bytes: usize) -> bool {
        match *self {}
    }

    /// # Safety
    /// None: there is no such range.
    pub(super) unsafe fn renew(&self, _offset: usize, _len: usize) -> bool {
        match *self {}
    }

    pub(super) fn address(&self, _unit: u32) -> *mut u8 {
        match *self {}
    }

    pub(super) fn unit_at(&self, _address: *const u8) -> Option<u32> {
        match *self {}
    }
}
