//! Numbers of 8 bits: sign, four of exponent (bias 7), three of mantissa, no infinities.
//!
//! Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; DeepSeek-V3's report for the scales of blocks.

use rayon::prelude::*;

/// What each byte stands for.
pub(super) static NUMBERS: [f32; 256] = {
    let mut numbers = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        numbers[byte] = number(byte as u32);
        byte += 1;
    }
    numbers
};

const fn number(byte: u32) -> f32 {
    let (exponent, mantissa) = ((byte >> 3) & 15, byte & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, mantissa) => mantissa as f32 / 512.0,
        // the exponent's bias of 7 becomes that of f32, 127
        _ => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
    };
    if byte & 128 == 0 { magnitude } else { -magnitude }
}

/// A matrix whose rows have `width` numbers: each times the scale of its block, rounded once. `scales` are in rows too, one for each block of
/// a row of blocks.
pub(super) fn decode<T: Copy + Default + Send>(
    bytes: &[u8],
    scales: &[f32],
    width: usize,
    [block_rows, block_width]: [usize; 2],
    rounded: impl Fn(f32) -> T + Sync,
) -> Vec<T> {
    let mut numbers = vec![T::default(); bytes.len()];
    let (width, blocks) = (width.max(1), width.div_ceil(block_width));
    let rows = numbers.par_chunks_mut(width).zip(bytes.par_chunks(width)).enumerate();
    rows.for_each(|(row, (numbers, bytes))| {
        let scales = scales.chunks(blocks.max(1)).nth(row / block_rows).unwrap_or_default();
        for ((numbers, bytes), scale) in numbers.chunks_mut(block_width).zip(bytes.chunks(block_width)).zip(scales) {
            for (number, &byte) in numbers.iter_mut().zip(bytes) {
                *number = rounded(NUMBERS[usize::from(byte)] * scale);
            }
        }
    });
    numbers
}
