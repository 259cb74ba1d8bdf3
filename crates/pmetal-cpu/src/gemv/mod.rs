//! Products with few rows, as in decoding: weights stream past once, in their own dtype, several of one input in one go.

#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod columns;
mod panels;

use half::bf16;

use crate::Element;
use crate::elementwise::convert_slice;
use crate::gemm::{Arithmetic, Mat, Matrix, PANEL, Right};
use crate::level::Level;
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::simd::simd_fn;
use crate::tasks::{for_each_task, threads};

/// The most rows that go this way.
pub const MAX_ROWS: usize = 8;
/// Rows whose sums a kernel holds in registers.
const TILE_ROWS: usize = 4;
/// Tasks that a thread finds. Columns are summed each by itself, so how many there are in a task does not show in the result: the longer the
/// stretch of memory that a thread reads, the faster.
const TASKS_PER_THREAD: usize = 4;
/// The least and the most bytes of a weight that make up a task.
const TASK_BYTES: [usize; 2] = [1 << 15, 1 << 20];
/// Elements of all weights below which threads cost more than they bring.
const SMALL: usize = 1 << 15;

/// One of several products of the same few rows.
pub struct FewRows<'a, C> {
    /// The result, `[rows, columns]`.
    pub c: &'a mut [C],
    /// Distance of its rows.
    pub c_row_stride: usize,
    /// `[depth, columns]`; see [`Right::streams`].
    pub right: Right<'a>,
    /// A second product that is added: `[rows, r]` contiguous, and `[r, columns]`.
    pub low_rank: Option<(&'a [f32], Right<'a>)>,
}

impl Right<'_> {
    /// Whether [`few_rows`] takes this operand: a packed weight, or a matrix whose columns are contiguous.
    pub fn streams(&self) -> bool {
        let contiguous = |(row_stride, col_stride): (usize, usize), rows| row_stride == 1 && col_stride >= rows;
        match self {
            Self::Plain(Matrix::F32(m)) => contiguous((m.row_stride, m.col_stride), m.rows),
            Self::Plain(Matrix::Bf16(m)) => contiguous((m.row_stride, m.col_stride), m.rows),
            Self::Plain(Matrix::F16(m)) => contiguous((m.row_stride, m.col_stride), m.rows),
            Self::Transposed(_) => true,
            Self::Weight(_) => false,
        }
    }
}

/// `C = alpha * (A B + U V) + beta * C` for each product, where `A` has at most [`MAX_ROWS`] rows and `U V` is the low-rank part.
///
/// With `beta` zero, `C` is not read. Sums are f32, rounded once.
pub fn few_rows<A: Element, C: Element>(a: Mat<A>, products: &mut [FewRows<C>], alpha: f32, beta: f32) {
    assert!(a.rows <= MAX_ROWS, "few_rows: {} rows", a.rows);
    products.iter().for_each(|product| product.check(a.rows, a.cols));
    if a.rows == 0 {
        return;
    }
    let pairs_pitch = a.cols.next_multiple_of(2);
    with_scratch(a.rows * (a.cols + pairs_pitch / 2), |scratch| {
        let (wide, pairs) = scratch.split_at_mut(a.rows * a.cols);
        widen(a, wide);
        let pairs: &mut [bf16] = bytemuck::cast_slice_mut(pairs);
        let pairs = multiplies_pairs::<A>().then(|| {
            for (pairs, wide) in pairs.chunks_exact_mut(pairs_pitch.max(1)).zip(wide.chunks_exact(a.cols.max(1))) {
                convert_slice(wide, &mut pairs[..a.cols]);
                pairs[a.cols..].fill(bf16::ZERO);
            }
            &*pairs
        });
        let left = Left { rows: a.rows, wide, pairs };
        let weights: usize = products.iter().map(|p| p.right.columns() * a.cols).sum();
        let [least, most] = TASK_BYTES;
        let task_bytes = (size_of::<bf16>() * weights / (TASKS_PER_THREAD * threads())).clamp(least, most);
        let targets = products.iter_mut().map(|p| Target::new(p, left, alpha, beta, task_bytes));
        let targets: Vec<Target<C>> = targets.collect();
        let tasks = targets.iter().map(|target| target.tasks).sum();
        let run = |task: usize| {
            let mut task = task;
            for target in &targets {
                if task < target.tasks {
                    return target.run(task);
                }
                task -= target.tasks;
            }
        };
        if weights <= SMALL { (0..tasks).for_each(run) } else { for_each_task(tasks, run) }
    });
}

fn widen<A: Element>(a: Mat<A>, wide: &mut [f32]) {
    for (i, row) in wide.chunks_exact_mut(a.cols.max(1)).enumerate() {
        if a.col_stride == 1 {
            convert_slice(&a.data[i * a.row_stride..][..a.cols], row);
            continue;
        }
        for (l, x) in row.iter_mut().enumerate() {
            *x = a.data[i * a.row_stride + l * a.col_stride].to_f32();
        }
    }
}

/// Whether rows of this dtype meet packed weights as pairs of bf16.
fn multiplies_pairs<A: Element>() -> bool {
    Level::current().has_avx512_bf16() && Arithmetic::of::<A>() == Arithmetic::Bf16
}

impl<C> FewRows<'_, C> {
    fn check(&self, rows: usize, depth: usize) {
        let columns = self.right.columns();
        assert_eq!(self.right.depth(), depth, "few_rows: depth");
        let needed = rows.saturating_sub(1) * self.c_row_stride + columns;
        assert!(
            self.c_row_stride >= columns && self.c.len() >= needed,
            "few_rows: C is too small for [{rows}, {columns}]"
        );
        assert!(self.right.streams(), "few_rows: the columns of the right operand are not contiguous");
        if let Some((u, v)) = &self.low_rank {
            assert!(u.len() == rows * v.depth() && v.columns() == columns && v.streams(), "few_rows: low-rank part");
        }
    }
}

/// The few rows.
#[derive(Clone, Copy)]
struct Left<'a> {
    rows: usize,
    /// `[rows, depth]`.
    wide: &'a [f32],
    /// The same as bf16, where packed weights are multiplied by that: rows are filled up to whole pairs.
    pairs: Option<&'a [bf16]>,
}

/// A product and how it is cut.
struct Target<'a, C> {
    c: Shared<'a, C>,
    c_row_stride: usize,
    columns: usize,
    terms: [Option<(Left<'a>, Right<'a>)>; 2],
    alpha: f32,
    beta: f32,
    task_columns: usize,
    tasks: usize,
}

impl<'a, C: Element> Target<'a, C> {
    fn new(product: &'a mut FewRows<C>, left: Left<'a>, alpha: f32, beta: f32, task_bytes: usize) -> Self {
        let (columns, right) = (product.right.columns(), product.right);
        let low_rank = product.low_rank.map(|(u, v)| (Left { wide: u, pairs: None, ..left }, v));
        let panels = task_bytes.div_ceil(PANEL * size_of::<bf16>() * right.depth().max(1));
        let task_columns = panels * PANEL;
        Self {
            c: Shared::new(product.c),
            c_row_stride: product.c_row_stride,
            columns,
            terms: [Some((left, right)), low_rank],
            alpha,
            beta,
            task_columns,
            tasks: columns.div_ceil(task_columns),
        }
    }

    fn run(&self, task: usize) {
        let first = task * self.task_columns;
        let columns = self.task_columns.min(self.columns - first);
        let Some((Left { rows, .. }, _)) = self.terms[0] else { return };
        with_scratch(columns.div_ceil(PANEL) * PANEL * rows, |sums| {
            sums.fill(0.0);
            for (left, right) in self.terms.iter().flatten() {
                left.add_products(right, first, columns, sums);
            }
            for i in 0..rows {
                // SAFETY: the columns belong to this task alone; rows do not overlap, because `check` saw the stride.
                let c = unsafe { self.c.part(i * self.c_row_stride + first, columns) };
                store(c, &sums[i * PANEL..], rows * PANEL, self.alpha, self.beta);
            }
        });
    }
}

impl Left<'_> {
    /// Adds the products with some columns from `first` on, a multiple of 16, to `sums [columns / 16][rows][16]`.
    fn add_products(&self, right: &Right, first: usize, columns: usize, sums: &mut [f32]) {
        match *right {
            Right::Transposed(weight) => {
                let (len, count) = (weight.panel_len(), columns.div_ceil(PANEL));
                let panels = &weight.panels()[first / PANEL * len..][..count * len];
                match self.pairs {
                    #[cfg(target_arch = "x86_64")]
                    Some(pairs) => avx512_bf16::add_products(self.rows, pairs, panels, sums),
                    _ => panels::add_products(self.rows, self.wide, panels, sums),
                }
            }
            Right::Plain(Matrix::F32(m)) => columns::add_products(self.rows, self.wide, m, first, columns, sums),
            Right::Plain(Matrix::Bf16(m)) => columns::add_products(self.rows, self.wide, m, first, columns, sums),
            Right::Plain(Matrix::F16(m)) => columns::add_products(self.rows, self.wide, m, first, columns, sums),
            Right::Weight(_) => unreachable!("`check` saw that the operand streams"),
        }
    }
}

simd_fn! {
    /// `c = round(alpha * sums + beta * c)` for a row, whose sums lie in groups of 16, `stride` apart.
    fn store['a; C](c: &'a mut [C], sums: &'a [f32], stride: usize, alpha: f32, beta: f32) -> () {
        for (c, sums) in c.chunks_mut(PANEL).zip(sums.chunks(stride)) {
            for (c, &sum) in c.iter_mut().zip(sums) {
                let old = if beta == 0.0 { 0.0 } else { beta * c.to_f32() };
                *c = C::from_f32(alpha * sum + old);
            }
        }
    }
}
