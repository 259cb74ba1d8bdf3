//! Buffers that a thread keeps between calls.

use std::cell::RefCell;

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers in a cache line: buffers start at one, so that no vector in them lies across two.
const ALIGNMENT: usize = 16;

/// Calls `f` with a buffer of `len` numbers whose contents are left over from earlier calls.
///
/// Calls nest: while one waits for other threads, this thread may start another kernel, which gets its own buffer.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len + ALIGNMENT {
        // The contents do not matter: growing in place would copy them.
        buffer = vec![0.0; len + ALIGNMENT];
    }
    let start = buffer.as_ptr().align_offset(ALIGNMENT * size_of::<f32>());
    let result = f(&mut buffer[start..start + len]);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}
