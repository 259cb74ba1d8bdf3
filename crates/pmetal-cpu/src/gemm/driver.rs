//! The loops around the tiles: sums of products, cut into tasks.
//!
//! A left operand is packed once, row by row, in slices of its depth. Tasks are rectangles of the result: for every slice of every term
//! the right operand's panels are taken where they lie, or packed into a buffer that stays in the second-level cache, and multiplied with
//! the rows; sums are f32 in a buffer, rounded once. Borders depend on the shapes alone.

use crate::Element;
use crate::gemm::kernel::Unit;
use crate::gemm::left::{Left, Rows};
use crate::gemm::pack::Part;
use crate::gemm::right::Right;
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::simd::simd_fn;
use crate::tasks::for_each_task;

/// The longest slice of a sum: two panels of it stay in the first-level cache.
pub(crate) const DEPTH: usize = 576;
/// Distance of the rows of a packed left operand. No power of two, so that rows do not share places in the cache.
pub(crate) const PITCH: usize = DEPTH + 32;
/// Rows and columns of a task: a slice of the rows and the task's sums stay in the second-level cache.
const TASK_ROWS: usize = 512;
const TASK_COLUMNS: usize = 64;
/// Rows of a task where the result is so narrow that columns alone would not make enough tasks.
const NARROW_ROWS: usize = 128;
/// Multiplications below which threads cost more than they bring.
const SMALL: usize = 1 << 18;

/// How a sum of `depth` products is cut: the length of slices, whole panels of a weight that is turned over.
pub(crate) fn slice_len(depth: usize) -> usize {
    depth.div_ceil(depth.div_ceil(DEPTH).max(1)).next_multiple_of(32)
}

/// What a kernel multiplies: rows of the left operand with panels of the right one, along a slice of the sum.
pub(crate) struct Slice<'a, E> {
    /// `[rows]`, [`PITCH`] apart.
    pub a: &'a [E],
    pub rows: usize,
    /// `[panels]`, `panel_len` apart: `[depths / 2][columns][2]` of bf16, `[depths][columns]` of f32.
    pub b: &'a [E],
    pub panel_len: usize,
    pub panels: usize,
    /// Even for bf16.
    pub depths: usize,
    /// Whether the result is added to what is there.
    pub add: bool,
}

impl<E> Slice<'_, E> {
    /// Asserts that the operands hold what a kernel for panels of `columns` reads, and the result what it writes.
    pub(crate) fn check(&self, c: &[f32], columns: usize) {
        assert!(self.rows > 0 && self.panels > 0 && self.depths <= PITCH, "gemm: an empty slice");
        assert!(self.a.len() >= (self.rows - 1) * PITCH + self.depths, "gemm: rows");
        assert!(self.b.len() >= (self.panels - 1) * self.panel_len + self.depths * columns, "gemm: panels");
        assert!(c.len() >= self.rows * self.panels * columns, "gemm: result");
    }
}

/// `C = alpha * sum of the terms' products + beta * C`, rows of `C` `c_row_stride` elements apart.
///
/// With `beta` zero, `C` is not read. All left operands have the same rows and were packed for the same arithmetic; all right operands
/// have the same columns.
pub fn multiply<C: Element>(c: &mut [C], c_row_stride: usize, terms: &[(&Left, Right)], alpha: f32, beta: f32) {
    let Some((left, right)) = terms.first() else { return };
    let (rows, columns) = (left.rows(), right.columns());
    for (left, right) in terms {
        assert!(left.rows() == rows && right.columns() == columns, "multiply: terms of different shapes");
        assert_eq!(left.depth(), right.depth(), "multiply: depth");
    }
    if rows == 0 || columns == 0 {
        return;
    }
    let needed = (rows - 1) * c_row_stride + columns;
    assert!(c_row_stride >= columns && c.len() >= needed, "multiply: C is too small for [{rows}, {columns}]");
    let job = Job { rows, columns, c: &Shared::new(c), c_row_stride, alpha, beta };
    match left.rows_of() {
        Rows::F32(_) => job.run(terms.iter().map(|(left, right)| (left.expect_f32(), right, left.depth()))),
        Rows::Bf16(_) => job.run(terms.iter().map(|(left, right)| (left.expect_bf16(), right, left.depth()))),
    }
}

/// A result and how it is cut.
struct Job<'a, C> {
    rows: usize,
    columns: usize,
    c: &'a Shared<'a, C>,
    c_row_stride: usize,
    alpha: f32,
    beta: f32,
}

impl<C: Element> Job<'_, C> {
    fn run<'t, E: Unit>(&self, terms: impl Iterator<Item = (&'t [E], &'t Right<'t>, usize)>) {
        let terms: Vec<_> = terms.collect();
        let depth: usize = terms.iter().map(|(_, _, depth)| depth).sum();
        let across = self.columns.div_ceil(TASK_COLUMNS);
        let most = if across < 8 { NARROW_ROWS } else { TASK_ROWS };
        let task_rows = self.rows.div_ceil(self.rows.div_ceil(most));
        let down = self.rows.div_ceil(task_rows);
        let run = |task: usize| {
            let (i, j) = (task / across * task_rows, task % across * TASK_COLUMNS);
            let (rows, columns) = (task_rows.min(self.rows - i), TASK_COLUMNS.min(self.columns - j));
            self.task(&terms, i, rows, j, columns);
        };
        if self.rows * self.columns * depth <= SMALL {
            (0..down * across).for_each(run);
        } else {
            for_each_task(down * across, run);
        }
    }

    /// The rectangle of `rows` from `i` and `columns` from `j`.
    fn task<E: Unit>(&self, terms: &[(&[E], &Right, usize)], i: usize, rows: usize, j: usize, columns: usize) {
        let width = E::panel();
        let panels = columns.div_ceil(width);
        let sums_len = rows * panels * width;
        let panels_len = (panels * width * DEPTH * size_of::<E>()).div_ceil(size_of::<f32>());
        with_scratch(sums_len + panels_len, |scratch| {
            let (sums, buffer) = scratch.split_at_mut(sums_len);
            let buffer: &mut [E] = bytemuck::cast_slice_mut(buffer);
            let mut add = false;
            for &(a, right, depth) in terms {
                let len = slice_len(depth);
                for (s, from) in (0..depth).step_by(len.max(1)).enumerate() {
                    let depths = len.min(depth - from).next_multiple_of(E::TOGETHER);
                    let (b, panel_len) =
                        E::panels(right, Part { lane: j, lanes: columns, depth: from, depths }, buffer);
                    let a = &a[(s * self.rows + i) * PITCH..];
                    E::multiply(&Slice { a, rows, b, panel_len, panels, depths, add }, sums);
                    add = true;
                }
            }
            if !add {
                sums.fill(0.0);
            }
            for (r, sums) in sums.chunks_exact(panels * width).enumerate() {
                // SAFETY: the rectangle belongs to this task alone; rows do not overlap, because `multiply` checked the stride.
                let c = unsafe { self.c.part((i + r) * self.c_row_stride + j, columns) };
                store(c, sums, self.alpha, self.beta);
            }
        });
    }
}

simd_fn! {
    /// `c = round(alpha * sums + beta * c)`.
    fn store['a; C](c: &'a mut [C], sums: &'a [f32], alpha: f32, beta: f32) -> () {
        if beta == 0.0 {
            for (c, &sum) in c.iter_mut().zip(sums) {
                *c = C::from_f32(alpha * sum);
            }
        } else {
            for (c, &sum) in c.iter_mut().zip(sums) {
                *c = C::from_f32(beta.mul_add(c.to_f32(), alpha * sum));
            }
        }
    }
}
