//! Packing: the order in which the inner loop of a product reads its operands.
//!
//! A panel holds `P` consecutive rows (of the left operand) or columns (of the right one) as `[depth][P]` f32, zeros
//! where the operand ends. A left panel may also lie row by row, which needs no transposition where the operand does. Widening from bf16 or f16 happens here, once per element, so the inner loop is f32 only.

use crate::Element;
use crate::simd::simd_fn;

/// An operand seen from its panels: element `(i, k)` of the operand is `data[i * lane_stride + k * depth_stride]`,
/// where `i` counts rows of the left or columns of the right operand and `k` runs along the sum.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, T> {
    pub data: &'a [T],
    pub lane_stride: usize,
    pub depth_stride: usize,
}

/// The part of an operand that goes into some neighbouring panels.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// First lane.
    pub lane: usize,
    /// Lanes; panels beyond the last one are filled up with zeros.
    pub lanes: usize,
    /// First depth.
    pub depth: usize,
    /// Depths.
    pub depths: usize,
}

/// Packs a part of an operand into panels of `width` lanes that start `panel_len` apart in `panels`.
pub(crate) fn pack_panels<T: Element>(
    operand: Operand<T>,
    part: Part,
    width: usize,
    panel_len: usize,
    panels: &mut [f32],
) {
    match width {
        32 => pack_32(operand, part, panel_len, panels),
        16 => pack_16(operand, part, panel_len, panels),
        12 => pack_12(operand, part, panel_len, panels),
        8 => pack_8(operand, part, panel_len, panels),
        6 => pack_6(operand, part, panel_len, panels),
        4 => pack_4(operand, part, panel_len, panels),
        2 => pack_2(operand, part, panel_len, panels),
        _ => unreachable!("no panel is {width} wide"),
    }
}

/// [`pack_panels`] for the widths that the instruction sets' tiles have.
macro_rules! pack_widths {
    ($($name:ident $width:literal),*) => { $(
        simd_fn! {
            fn $name['a; T](operand: Operand<'a, T>, part: Part, panel_len: usize, panels: &'a mut [f32]) -> () {
                if operand.lane_stride == 1 {
                    pack_rows::<T, $width>(operand, part, panel_len, panels);
                } else {
                    pack_columns::<T, $width>(operand, part, panel_len, panels);
                }
            }
        }
    )* };
}
pack_widths!(pack_32 32, pack_16 16, pack_12 12, pack_8 8, pack_6 6, pack_4 4, pack_2 2);

/// The lanes lie side by side in memory: every depth is a copy, cut into panels. Reading whole rows of the operand before
/// the next depth keeps to few pages of memory.
#[inline(always)]
fn pack_rows<T: Element, const P: usize>(operand: Operand<T>, part: Part, panel_len: usize, panels: &mut [f32]) {
    for k in 0..part.depths {
        let start = part.lane + (part.depth + k) * operand.depth_stride;
        let (full, rest) = operand.data[start..start + part.lanes].as_chunks::<P>();
        let mut panels = panels.chunks_exact_mut(panel_len).map(|panel| &mut panel.as_chunks_mut::<P>().0[k]);
        for (source, row) in full.iter().zip(&mut panels) {
            // Read as a whole before it is written: the compiler then works on vectors and not on single lanes.
            *row = std::array::from_fn(|lane| source[lane].to_f32());
        }
        if let (false, Some(row)) = (rest.is_empty(), panels.next()) {
            row.fill(0.0);
            row.iter_mut().zip(rest).for_each(|(y, x)| *y = x.to_f32());
        }
    }
}

/// Depths that [`pack_columns`] transposes at a time.
const BLOCK: usize = 64;

/// The depths lie side by side in memory, or nothing does: transposes block by block. Each lane's block is widened into a
/// buffer first, because lanes are often a power of two apart and would push each other out of the cache.
#[inline(always)]
fn pack_columns<T: Element, const P: usize>(operand: Operand<T>, part: Part, panel_len: usize, panels: &mut [f32]) {
    let (lane_stride, depth_stride) = (operand.lane_stride, operand.depth_stride);
    for (p, panel) in panels.chunks_exact_mut(panel_len).enumerate() {
        let lanes = P.min(part.lanes - p * P);
        let data = &operand.data[(part.lane + p * P) * lane_stride + part.depth * depth_stride..];
        let (rows, _) = panel[..part.depths * P].as_chunks_mut::<P>();
        let mut block = [[0.0f32; BLOCK]; P];
        for (b, rows) in rows.chunks_mut(BLOCK).enumerate() {
            for (lane, buffer) in block.iter_mut().enumerate().take(lanes) {
                let source = &data[lane * lane_stride + b * BLOCK * depth_stride..];
                if depth_stride == 1 {
                    for (y, x) in buffer.iter_mut().zip(source).take(rows.len()) {
                        *y = x.to_f32();
                    }
                } else {
                    for (y, x) in buffer.iter_mut().zip(source.iter().step_by(depth_stride)).take(rows.len()) {
                        *y = x.to_f32();
                    }
                }
            }
            for (k, row) in rows.iter_mut().enumerate() {
                for (y, buffer) in row.iter_mut().zip(&block) {
                    *y = buffer[k];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn panels_hold_every_element_where_the_kernel_looks() {
        let data: Vec<bf16> = (0..110 * 110).map(|i| <bf16 as Element>::from_f32((i % 251) as f32)).collect();
        for (lane_stride, depth_stride) in [(110, 1), (1, 110), (60, 2)] {
            let operand = Operand { data: &data, lane_stride, depth_stride };
            for width in [2usize, 4, 6, 8, 12, 16, 32] {
                for (lanes, depths) in [(3 * width, 16), (2 * width - 1, 19), (1, 3)] {
                    let panel_len = depths * width + 5;
                    let mut panels = vec![f32::NAN; lanes.div_ceil(width) * panel_len];
                    let part = Part { lane: 3, lanes, depth: 2, depths };
                    pack_panels(operand, part, width, panel_len, &mut panels);
                    for k in 0..depths {
                        for lane in 0..lanes.next_multiple_of(width) {
                            let at = (3 + lane) * lane_stride + (2 + k) * depth_stride;
                            let expected = if lane < lanes { data[at].to_f32() } else { 0.0 };
                            let actual = panels[lane / width * panel_len + k * width + lane % width];
                            assert_eq!(actual, expected, "width {width}, {lanes} lanes: depth {k}, lane {lane}");
                        }
                    }
                }
            }
        }
    }
}
