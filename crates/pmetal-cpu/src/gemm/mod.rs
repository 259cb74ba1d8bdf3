//! Products of matrices of f32, bf16 and f16 in any layout, summed in f32.
//!
//! The scheme is that of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008): operands are packed into the
//! order in which the inner loop reads them ([`Left`], [`PackedWeight`], or per task), and tiles of the result are computed in registers.
//! Every element of the result is summed along the depth in the same order whatever the tasks are.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512_pack;
mod driver;
mod kernel;
mod left;
#[cfg(target_arch = "aarch64")]
mod neon_bf16;
pub(crate) mod pack;
mod packed;
mod right;
pub(crate) mod tile;

pub use driver::multiply;
pub use kernel::Arithmetic;
pub use left::Left;
pub use packed::PackedWeight;
pub use right::Right;
#[cfg(target_arch = "x86_64")]
pub(crate) use {avx512_bf16::pairs, avx512_pack::transposed, right::bf16_panels};

use half::{bf16, f16};

use crate::Element;
use crate::gemm::pack::Operand;
use crate::gemv::{FewRows, MAX_ROWS, few_rows};

/// Columns of a panel of bf16.
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

    /// Rows of the view.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the view.
    pub fn cols(&self) -> usize {
        self.cols
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

/// A matrix of one of the dtypes.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    F32(Mat<'a, f32>),
    Bf16(Mat<'a, bf16>),
    F16(Mat<'a, f16>),
}

impl Matrix<'_> {
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self {
            Self::F32(m) => (m.rows, m.cols),
            Self::Bf16(m) => (m.rows, m.cols),
            Self::F16(m) => (m.rows, m.cols),
        }
    }
}

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
    if m > 0 && m <= MAX_ROWS && b.row_stride == 1 && b.col_stride >= k {
        assert!(c_row_stride >= n && c.len() >= (m - 1) * c_row_stride + n, "matmul: C is too small for [{m}, {n}]");
        let product = FewRows { c, c_row_stride, right: Right::plain(b), low_rank: None };
        return few_rows(a, &mut [product], alpha, beta);
    }
    // operands of f32 are not rounded unasked
    let arithmetic =
        if Arithmetic::of::<A>() == Arithmetic::of::<B>() { Arithmetic::of::<A>() } else { Arithmetic::F32 };
    multiply(c, c_row_stride, &[(&Left::new(a, arithmetic), Right::plain(b))], alpha, beta);
}
