//! Products of matrices of f32, bf16 and f16 in any layout, summed in f32.
//!
//! The scheme is that of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008): the result is
//! cut into blocks; for each, a slice of both operands along the sum is packed ([`crate::gemm_pack`]) into panels that stay
//! in the caches, then tiles of the result are computed in registers ([`crate::gemm_kernel`]). bf16 and f16 widen while
//! they are packed. Every element of the result is summed along `k` in the same order whatever the blocks are.

mod packed;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::Element;
use crate::gemm_kernel::{DEPTH, LeftLayout, PITCH, Tile, product, tile, tile_of};
use crate::gemm_pack::{Operand, Part, pack_panels, pack_row_panels};
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::simd::{arch, for_each_task, simd_fn};

pub use packed::PackedWeight;

/// Columns of a panel of the right operand.
pub(crate) const PANEL: usize = 16;

/// A view of a matrix in a slice.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a, T: Element> Mat<'a, T> {
    /// A contiguous row-major matrix.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(data.len() >= needed, "Mat: {} elements for [{rows}, {cols}] with stride {row_stride}", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view of the same elements.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn left_operand(self) -> Operand<'a, T> {
        Operand { data: self.data, lane_stride: self.row_stride, depth_stride: self.col_stride }
    }

    fn right_operand(self) -> Operand<'a, T> {
        self.t().left_operand()
    }
}

/// Rows and columns of a block of the result: bounds the packed slices and the f32 copy of a bf16 block.
const BLOCK_ROWS: usize = 1536;
const BLOCK_COLUMNS: usize = 1024;
/// Panels that one task multiplies: rows that stay in the second-level cache, and columns.
const TASK_ROW_PANELS: usize = 8;
const TASK_COLUMN_PANELS: usize = 4;
/// Panels that one task packs.
const PACK_PANELS: usize = 8;
/// Multiplications below which threads cost more than they bring.
const SMALL: usize = 1 << 19;

/// `C = alpha * A B + beta * C`, where `C` is `[a.rows, b.cols]` with rows `c_row_stride` elements apart.
///
/// With `beta` zero, `C` is not read. The sum is f32 and rounded once. The products of a linear layer with weight
/// `w: [out, in]` are `y = x w.t()`, `dx = dy w` and `dw += dy.t() x`.
pub fn matmul<A: Element, B: Element, C: Element>(
    c: &mut [C],
    c_row_stride: usize,
    a: Mat<A>,
    b: Mat<B>,
    alpha: f32,
    beta: f32,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "matmul: A is [{m}, {k}], B is [{}, {n}]", b.rows);
    if m == 0 || n == 0 {
        return;
    }
    assert!(c_row_stride >= n && c.len() >= (m - 1) * c_row_stride + n, "matmul: C is too small for [{m}, {n}]");
    if m <= crate::gemv::MAX_ROWS && b.row_stride == 1 && b.col_stride >= k {
        return crate::gemv::few_rows(c, c_row_stride, a, b, alpha, beta);
    }
    for i in (0..m).step_by(BLOCK_ROWS) {
        for j in (0..n).step_by(BLOCK_COLUMNS) {
            let rows = BLOCK_ROWS.min(m - i);
            let columns = BLOCK_COLUMNS.min(n - j);
            let block = Block { i, j, rows, columns, depth: k };
            let c = &mut c[i * c_row_stride + j..];
            block.compute(c, c_row_stride, a.left_operand(), b.right_operand(), alpha, beta);
        }
    }
}

/// A block of the result and the operands' places that belong to it.
#[derive(Clone, Copy)]
struct Block {
    i: usize,
    j: usize,
    rows: usize,
    columns: usize,
    depth: usize,
}

impl Block {
    /// Computes the block into `c`, which starts at the block's first element.
    fn compute<A: Element, B: Element, C: Element>(
        self,
        c: &mut [C],
        c_row_stride: usize,
        a: Operand<A>,
        b: Operand<B>,
        alpha: f32,
        beta: f32,
    ) {
        if let Some(c) = C::as_f32s_mut(c) {
            return self.accumulate(c, c_row_stride, a, b, alpha, beta);
        }
        let columns = self.columns;
        with_scratch(self.rows * columns, |sums| {
            self.accumulate(sums, columns, a, b, alpha, 0.0);
            let round = |(c, sums): (&mut [C], &[f32])| finish_row(&mut c[..columns], sums, beta);
            if self.is_small() {
                c.chunks_mut(c_row_stride).zip(sums.chunks_exact(columns)).for_each(round);
            } else {
                c.par_chunks_mut(c_row_stride).zip(sums.par_chunks_exact(columns)).for_each(round);
            }
        });
    }

    fn is_small(&self) -> bool {
        self.rows * self.columns * self.depth.max(1) <= SMALL
    }

    /// `c = alpha * A B + beta * c` for an f32 block, slice by slice along the sum.
    fn accumulate<A: Element, B: Element>(
        self,
        c: &mut [f32],
        c_row_stride: usize,
        a: Operand<A>,
        b: Operand<B>,
        alpha: f32,
        beta: f32,
    ) {
        let tile = tile();
        let slices = self.depth.div_ceil(DEPTH).max(1);
        let depth = self.depth.div_ceil(slices);
        let (row_panel, column_panel) = (tile.rows * PITCH, tile.columns * depth);
        let layout = if a.depth_stride == 1 { LeftLayout::Rows } else { LeftLayout::Interleaved };
        let a_len = self.rows.div_ceil(tile.rows) * row_panel;
        let b_len = self.columns.div_ceil(tile.columns) * column_panel;
        with_scratch(a_len + b_len, |packed| {
            let (packed_a, packed_b) = packed.split_at_mut(a_len);
            for slice in 0..slices {
                let from = slice * depth;
                let depths = depth.min(self.depth - from);
                let rows = Part { lane: self.i, lanes: self.rows, depth: from, depths };
                self.pack(rows, tile.rows, row_panel, packed_a, |part, panels| match layout {
                    LeftLayout::Rows => pack_row_panels(a, part, panels),
                    LeftLayout::Interleaved => pack_panels(a, part, tile.rows, row_panel, panels),
                });
                let columns = Part { lane: self.j, lanes: self.columns, depth: from, depths };
                self.pack(columns, tile.columns, column_panel, packed_b, |part, panels| {
                    pack_panels(b, part, tile.columns, column_panel, panels);
                });
                let beta = if slice == 0 { beta } else { 1.0 };
                let sources = Sources { layout, a: packed_a, row_panel, b: packed_b, column_panel, depths };
                self.multiply(c, c_row_stride, &sources, tile, alpha, beta);
            }
        });
    }

    /// Cuts a part into groups of panels and packs them side by side with `pack(part of the group, its panels)`.
    fn pack(
        self,
        all: Part,
        width: usize,
        panel_len: usize,
        packed: &mut [f32],
        pack: impl Fn(Part, &mut [f32]) + Send + Sync,
    ) {
        if panel_len == 0 {
            return;
        }
        let group = PACK_PANELS * width;
        let run = |(g, panels): (usize, &mut [f32])| {
            let lanes = group.min(all.lanes - g * group);
            pack(Part { lane: all.lane + g * group, lanes, ..all }, panels);
        };
        if self.is_small() {
            packed.chunks_mut(PACK_PANELS * panel_len).enumerate().for_each(run);
        } else {
            packed.par_chunks_mut(PACK_PANELS * panel_len).enumerate().for_each(run);
        }
    }

    /// Multiplies packed slices, tasks side by side.
    fn multiply(self, c: &mut [f32], c_row_stride: usize, sources: &Sources, tile: Tile, alpha: f32, beta: f32) {
        let (task_rows, task_columns) = (TASK_ROW_PANELS * tile.rows, TASK_COLUMN_PANELS * tile.columns);
        let (down, across) = (self.rows.div_ceil(task_rows), self.columns.div_ceil(task_columns));
        let target = Shared::new(c);
        let run = |task: usize| {
            let (i, j) = (task % down * task_rows, task / down * task_columns);
            arch().dispatch(Task {
                target: &target,
                row_stride: c_row_stride,
                i,
                j,
                rows: task_rows.min(self.rows - i),
                columns: task_columns.min(self.columns - j),
                sources,
                alpha,
                beta,
            });
        };
        if self.is_small() {
            (0..down * across).for_each(run);
        } else {
            for_each_task(down * across, run);
        }
    }
}

simd_fn! {
    /// `c = round(sums + beta * c)`.
    pub(crate) fn finish_row['a; C](c: &'a mut [C], sums: &'a [f32], beta: f32) -> () {
        if beta == 0.0 {
            for (c, &sum) in c.iter_mut().zip(sums) {
                *c = C::from_f32(sum);
            }
        } else {
            for (c, &sum) in c.iter_mut().zip(sums) {
                *c = C::from_f32(beta.mul_add(c.to_f32(), sum));
            }
        }
    }
}

/// The packed slices of both operands.
struct Sources<'a> {
    layout: LeftLayout,
    a: &'a [f32],
    row_panel: usize,
    b: &'a [f32],
    column_panel: usize,
    depths: usize,
}

/// A rectangle of the block.
struct Task<'a> {
    target: &'a Shared<'a, f32>,
    row_stride: usize,
    i: usize,
    j: usize,
    rows: usize,
    columns: usize,
    sources: &'a Sources<'a>,
    alpha: f32,
    beta: f32,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match tile_of::<S>().rows {
            12 => self.run::<S, 12>(simd),
            _ => self.run::<S, 6>(simd),
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let (width, from) = (2 * S::F32_LANES, self.sources);
        for j in (0..self.columns).step_by(width) {
            let b = &from.b[(self.j + j) / width * from.column_panel..][..width * from.depths];
            for i in (0..self.rows).step_by(R) {
                let a = &from.a[(self.i + i) / R * from.row_panel..][..from.row_panel];
                let sums = product::<S, R>(simd, from.layout, a, b);
                let columns = width.min(self.columns - j);
                for (r, sums) in sums.iter().enumerate().take(self.rows - i) {
                    let start = (self.i + i + r) * self.row_stride + self.j + j;
                    // SAFETY: row and columns lie inside this task's rectangle, which `Block::multiply` cut out of the
                    // block for this task alone; rows do not overlap, because `matmul` checked the stride.
                    let c = unsafe { self.target.part(start, columns) };
                    self.store(simd, c, sums);
                }
            }
        }
    }

    /// `c = alpha * sums + beta * c` for one row of a tile.
    #[inline(always)]
    fn store<S: Simd>(&self, simd: S, c: &mut [f32], sums: &[S::f32s; 2]) {
        if c.len() == 2 * S::F32_LANES {
            let (c, _) = S::as_mut_simd_f32s(c);
            let (alpha, beta) = (simd.splat_f32s(self.alpha), simd.splat_f32s(self.beta));
            for (c, &sum) in c.iter_mut().zip(sums) {
                let sum = simd.mul_f32s(alpha, sum);
                *c = if self.beta == 0.0 { sum } else { simd.mul_add_f32s(beta, *c, sum) };
            }
            return;
        }
        for (c, &sum) in c.iter_mut().zip(bytemuck::cast_slice::<S::f32s, f32>(sums)) {
            let sum = self.alpha * sum;
            *c = if self.beta == 0.0 { sum } else { self.beta.mul_add(*c, sum) };
        }
    }
}
