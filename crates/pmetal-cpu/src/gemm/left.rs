//! Left operands: packed once, row by row, for any number of products.

use half::bf16;
use rayon::prelude::*;

use crate::Element;
use crate::gemm::Mat;
use crate::gemm::driver::{PITCH, slice_len};
use crate::gemm::kernel::{Arithmetic, Unit};
use crate::room::room;
use crate::simd::simd_fn;

/// A left operand `[rows, depth]` in the layout of the kernels.
pub struct Left {
    packed: Rows,
    rows: usize,
    depth: usize,
}

/// `[slice of the depth][rows][PITCH]`.
pub(crate) enum Rows {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Rows behind the last one: a kernel may read a whole tile and use a part of it.
const SPARE_ROWS: usize = 31;

/// Rows that one task packs.
const TASK_ROWS: usize = 64;

impl Left {
    /// Packs `matrix [rows, depth]` for products in `arithmetic`, rounding to bf16 where that is it.
    pub fn new<T: Element>(matrix: Mat<T>, arithmetic: Arithmetic) -> Self {
        let packed = match arithmetic {
            Arithmetic::F32 => Rows::F32(packed(matrix)),
            Arithmetic::Bf16 => Rows::Bf16(packed(matrix)),
        };
        Self { packed, rows: matrix.rows, depth: matrix.cols }
    }

    /// Rows of the operand.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of the sums it takes part in.
    pub fn depth(&self) -> usize {
        self.depth
    }

    pub(crate) fn rows_of(&self) -> &Rows {
        &self.packed
    }

    pub(crate) fn expect_f32(&self) -> &[f32] {
        match &self.packed {
            Rows::F32(rows) => rows,
            Rows::Bf16(_) => panic!("multiply: left operands of one sum are packed for the same arithmetic"),
        }
    }

    pub(crate) fn expect_bf16(&self) -> &[bf16] {
        match &self.packed {
            Rows::Bf16(rows) => rows,
            Rows::F32(_) => panic!("multiply: left operands of one sum are packed for the same arithmetic"),
        }
    }
}

fn packed<T: Element, E: Unit>(m: Mat<T>) -> Vec<E> {
    let len = slice_len(m.cols).max(1);
    let slices = m.cols.div_ceil(len);
    let mut rows = room::<E>((slices * m.rows + SPARE_ROWS) * PITCH);
    if m.rows == 0 {
        return rows;
    }
    rows[..slices * m.rows * PITCH].par_chunks_exact_mut(m.rows * PITCH).enumerate().for_each(|(s, slice)| {
        let depths = len.min(m.cols - s * len);
        slice.par_chunks_mut(TASK_ROWS * PITCH).enumerate().for_each(|(t, rows)| {
            let data = &m.data[t * TASK_ROWS * m.row_stride + s * len * m.col_stride..];
            if m.col_stride == 1 {
                copy_rows(data, m.row_stride, depths, rows);
            } else {
                turn_rows(data, m.row_stride, m.col_stride, depths, rows);
            }
        });
    });
    rows
}

simd_fn! {
    /// The depths lie side by side in memory. Where their number is odd, the last pair is filled up.
    fn copy_rows['a; T, E](data: &'a [T], row_stride: usize, depths: usize, rows: &'a mut [E]) -> () {
        for (i, row) in rows.chunks_exact_mut(PITCH).enumerate() {
            for (y, x) in row.iter_mut().zip(&data[i * row_stride..][..depths]) {
                *y = E::from_f32(x.to_f32());
            }
            row[depths] = E::ZERO;
        }
    }
}

simd_fn! {
    /// Rows lie side by side in memory, or nothing does.
    fn turn_rows['a; T, E](data: &'a [T], row_stride: usize, depth_stride: usize, depths: usize, rows: &'a mut [E]) -> () {
        let count = rows.len() / PITCH;
        for first in (0..count).step_by(16) {
            let here = 16.min(count - first);
            let rows = &mut rows[first * PITCH..(first + here) * PITCH];
            for k in 0..depths {
                let column = &data[first * row_stride + k * depth_stride..];
                for i in 0..here {
                    rows[i * PITCH + k] = E::from_f32(column[i * row_stride].to_f32());
                }
            }
            for row in rows.chunks_exact_mut(PITCH) {
                row[depths] = E::ZERO;
            }
        }
    }
}
