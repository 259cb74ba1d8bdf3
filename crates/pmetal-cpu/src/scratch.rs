//! Buffers that a thread keeps between calls.

use std::cell::RefCell;

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with a buffer of `len` numbers whose contents are left over from earlier calls.
///
/// Calls nest: while one waits for other threads, this thread may start another kernel, which gets its own buffer.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}
