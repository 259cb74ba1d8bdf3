//! Vectors for results that a kernel writes completely.

use bytemuck::Pod;

/// A vector of `len` numbers, each whatever its memory held before: for a kernel that writes all of them, so that filling
/// them first would be wasted.
///
/// In a debug build every byte is `0xff`, a NaN in each dtype, so that a test sees what a kernel has left out.
pub fn room<T: Pod>(len: usize) -> Vec<T> {
    let mut room = Vec::with_capacity(len);
    fill_by_name_only(room.as_mut_ptr(), len);
    // SAFETY: `len` elements were reserved, and by the call above each holds some value; any bits are a value of `T`.
    unsafe { room.set_len(len) };
    if cfg!(debug_assertions) {
        bytemuck::cast_slice_mut::<T, u8>(&mut room).fill(0xff);
    }
    room
}

/// Makes `len` elements from `start` on values in the eyes of the compiler.
#[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
fn fill_by_name_only<T: Pod>(start: *mut T, _len: usize) {
    // SAFETY: no instruction is executed. The compiler knows nothing about the text, which is allowed to write to memory that it
    // has a pointer to: for what follows, it may have written to every element the very bits that lie there. They stay
    // what they are until somebody writes: no allocator hands out memory that it has told the system to take back.
    unsafe { std::arch::asm!("/* {0} */", in(reg) start, options(nostack, preserves_flags)) };
}

#[cfg(any(not(any(target_arch = "x86_64", target_arch = "aarch64")), miri))]
fn fill_by_name_only<T: Pod>(start: *mut T, len: usize) {
    // SAFETY: the caller has reserved the elements.
    unsafe { start.write_bytes(0, len) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_the_length_asked_for_and_keeps_what_is_written() {
        for len in [0, 1, 17, 100_000] {
            let mut numbers = room::<f32>(len);
            assert_eq!(numbers.len(), len);
            numbers.iter_mut().zip(0u32..).for_each(|(x, i)| *x = (i % 100) as f32);
            assert!(numbers.iter().zip(0u32..).all(|(&x, i)| x == (i % 100) as f32));
        }
    }

    #[test]
    #[cfg(debug_assertions)]
    fn a_debug_build_shows_what_nobody_wrote() {
        assert!(room::<half::bf16>(100).iter().all(|x| x.is_nan()));
        assert!(room::<f32>(100).iter().all(|x| x.is_nan()));
    }
}
