//! Packing: the order in which the inner loop of a product reads its operands.
//!
//! A panel holds `P` consecutive rows (of the left operand) or columns (of the right one) as `[depth][P]` f32, zeros
//! where the operand ends. Widening from bf16 or f16 happens here, once per element, so the inner loop is f32 only.

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

/// Packs lanes `lane..lane + lanes` (at most the panel's width), depths `depth..depth + depths`, into
/// `panel[..depths * width]`.
pub(crate) fn pack_panel<T: Element>(
    operand: Operand<T>,
    lane: usize,
    lanes: usize,
    depth: usize,
    depths: usize,
    width: usize,
    panel: &mut [f32],
) {
    let start = lane * operand.lane_stride + depth * operand.depth_stride;
    let data = &operand.data[start..];
    let panel = &mut panel[..depths * width];
    if operand.lane_stride == 1 {
        pack_rows(data, operand.depth_stride, lanes, width, panel);
    } else {
        match width {
            32 => pack_columns_32(data, operand, lanes, panel),
            16 => pack_columns_16(data, operand, lanes, panel),
            12 => pack_columns_12(data, operand, lanes, panel),
            8 => pack_columns_8(data, operand, lanes, panel),
            6 => pack_columns_6(data, operand, lanes, panel),
            4 => pack_columns_4(data, operand, lanes, panel),
            2 => pack_columns_2(data, operand, lanes, panel),
            _ => unreachable!("no panel is {width} wide"),
        }
    }
}

simd_fn! {
    /// The lanes lie side by side in memory: every depth is a copy.
    fn pack_rows['a; T](data: &'a [T], depth_stride: usize, lanes: usize, width: usize, panel: &'a mut [f32]) -> () {
        for (k, row) in panel.chunks_exact_mut(width).enumerate() {
            let source = &data[k * depth_stride..][..lanes];
            for (y, x) in row.iter_mut().zip(source) {
                *y = x.to_f32();
            }
            row[lanes..].fill(0.0);
        }
    }
}

/// Depths that [`pack_columns`] transposes at a time.
const BLOCK: usize = 16;

macro_rules! pack_columns {
    ($($name:ident $width:literal),*) => { $(
        simd_fn! {
            fn $name['a; T](data: &'a [T], operand: Operand<'a, T>, lanes: usize, panel: &'a mut [f32]) -> () {
                pack_columns::<T, $width>(data, operand, lanes, panel);
            }
        }
    )* };
}
pack_columns!(
    pack_columns_32 32, pack_columns_16 16, pack_columns_12 12, pack_columns_8 8, pack_columns_6 6,
    pack_columns_4 4, pack_columns_2 2
);

/// The depths lie side by side in memory, or nothing does: transposes block by block. Each lane's block is widened into a
/// buffer first, because lanes are often a power of two apart and would push each other out of the cache.
#[inline(always)]
fn pack_columns<T: Element, const P: usize>(data: &[T], operand: Operand<T>, lanes: usize, panel: &mut [f32]) {
    let (lane_stride, depth_stride) = (operand.lane_stride, operand.depth_stride);
    let mut block = [[0.0f32; BLOCK]; P];
    let (rows, _) = panel.as_chunks_mut::<P>();
    for (b, rows) in rows.chunks_mut(BLOCK).enumerate() {
        for (lane, buffer) in block.iter_mut().enumerate().take(lanes) {
            let source = &data[lane * lane_stride + b * BLOCK * depth_stride..];
            if depth_stride == 1 && rows.len() == BLOCK {
                for (y, x) in buffer.iter_mut().zip(&source[..BLOCK]) {
                    *y = x.to_f32();
                }
            } else {
                for (y, x) in buffer.iter_mut().zip(source.iter().step_by(depth_stride)).take(rows.len()) {
                    *y = x.to_f32();
                }
            }
        }
        for (k, row) in rows.iter_mut().enumerate() {
            for lane in 0..P {
                row[lane] = block[lane][k];
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
        let data: Vec<bf16> = (0..40 * 50).map(|i| <bf16 as Element>::from_f32((i % 251) as f32)).collect();
        for (lane_stride, depth_stride) in [(50, 1), (1, 50), (50, 2)] {
            let operand = Operand { data: &data, lane_stride, depth_stride };
            for width in [2, 4, 6, 8, 12, 16, 32] {
                for (lanes, depths) in [(width, 16), (width - 1, 19), (1, 3)] {
                    let mut panel = vec![f32::NAN; depths * width];
                    pack_panel(operand, 3, lanes, 2, depths, width, &mut panel);
                    for k in 0..depths {
                        for lane in 0..width {
                            let at = (3 + lane) * lane_stride + (2 + k) * depth_stride;
                            let expected = if lane < lanes { data[at].to_f32() } else { 0.0 };
                            assert_eq!(panel[k * width + lane], expected, "{width} {lanes} {depths} {k} {lane}");
                        }
                    }
                }
            }
        }
    }
}
