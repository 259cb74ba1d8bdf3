//! One slice that several tasks write to, each to places of its own.

use std::marker::PhantomData;

/// A mutable slice handed to tasks whose parts of it interleave, so that it cannot be split up front.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable slice; tasks promise `Shared::part` that their parts are disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements `from..from + len`.
    ///
    /// # Safety
    /// No other part that overlaps this one is in use while it lives.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "a task writes outside its slice");
        // SAFETY: the range lies inside the slice that `new` borrowed for as long as `self` lives, and by the caller's
        // promise this is its only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}
