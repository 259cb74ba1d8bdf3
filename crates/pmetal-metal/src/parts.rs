//! Parts of a flat tensor that belong into matrices: adapters beside the weights that they change.

use candle_core::{DType, Tensor};

/// A matrix among the values of a flat tensor, and where in a wider matrix its copy lies.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Its first value.
    pub first: usize,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
    /// Where its copy lies: two-dimensional and contiguous.
    pub matrix: &'a Tensor,
    /// The row of the matrix that its first row lies in.
    pub row: usize,
    /// The column of the matrix that its first column lies in.
    pub column: usize,
}

/// Parts as a device's kernel reads them, for matrices that stay where they lie.
#[derive(Clone, Debug)]
pub struct PartTable {
    /// On the device.
    pub table: Tensor,
    /// Parts.
    pub count: usize,
    /// Values of the largest part.
    pub largest: usize,
    /// Of the matrices.
    pub dtype: DType,
}
