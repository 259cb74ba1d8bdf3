//! Numbers of 4 bits, 32 to a group, and a power of two for each group.
//!
//! Source: Open Compute Project, "Microscaling Formats (MX) Specification" 1.0 (E2M1 with E8M0 scales).

use half::bf16;
use rayon::prelude::*;

/// Numbers of a group.
pub(super) const NUMBERS: usize = 32;
/// Their bytes: two to a byte, the first in the low half.
pub(super) const BYTES: usize = NUMBERS / 2;

const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Groups a task decodes.
const TASK: usize = 1024;

/// The power of two that a scale stands for.
pub(super) fn power(scale: u8) -> f32 {
    f32::from(i16::from(scale) - 127).exp2()
}

/// The numbers of groups in their order.
pub(super) fn decode(blocks: &[u8], scales: &[u8]) -> Vec<bf16> {
    let mut numbers = vec![bf16::ZERO; blocks.len() * 2];
    let groups = numbers.par_chunks_mut(NUMBERS).zip(blocks.par_chunks(BYTES)).zip(scales).with_min_len(TASK);
    groups.for_each(|((numbers, bytes), &scale)| {
        let scale = power(scale);
        for (pair, byte) in numbers.chunks_mut(2).zip(bytes) {
            for (number, bits) in pair.iter_mut().zip([byte & 15, byte >> 4]) {
                *number = bf16::from_f32(VALUES[usize::from(bits)] * scale);
            }
        }
    });
    numbers
}
