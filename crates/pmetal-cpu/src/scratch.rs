//! Buffers that a thread keeps between calls.

use std::cell::RefCell;

use crate::room;

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers in a cache line: buffers start at one, so that no vector in them lies across two.
const ALIGNMENT: usize = 16;

/// Numbers of the longest buffer that is kept, a mebibyte: longer ones go back to the allocator, which keeps them for everybody.
const LONGEST: usize = 1 << 18;

/// Calls `f` with a buffer of `len` numbers whose contents are left over from earlier calls.
///
/// Calls nest: while one waits for other threads, this thread may start another kernel, which gets its own buffer.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let needed = len + ALIGNMENT;
    if needed > LONGEST {
        return f(aligned(&mut room(needed), len));
    }
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < needed {
        // The contents do not matter: growing in place would copy them.
        buffer = room(needed);
    }
    let result = f(aligned(&mut buffer, len));
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

fn aligned(buffer: &mut [f32], len: usize) -> &mut [f32] {
    let start = buffer.as_ptr().align_offset(ALIGNMENT * size_of::<f32>());
    &mut buffer[start..start + len]
}
