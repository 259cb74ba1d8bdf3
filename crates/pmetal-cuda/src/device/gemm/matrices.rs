//! Products and matrices in the words of cuBLASLt.

use std::{
    ffi::{c_int, c_void},
    mem::{MaybeUninit, size_of},
    ptr,
};

use candle_core::{
    DType,
    cuda_backend::cudarc::cublaslt::{
        result::{self, CublasError},
        sys::{
            self, cublasComputeType_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t,
            cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t, cublasLtReductionScheme_t,
            cublasStatus_t, cudaDataType,
        },
    },
};
use pmetal_metal::{Error, Result};

/// Bytes that a product may use beside its operands: what NVIDIA advises for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;
/// How many algorithms are tried for a product: on an H100 the fastest of eight took up to 12 % less time than the first.
const PROPOSALS: usize = 8;

/// What a plan depends on, in the column-major words of the library: its first operand is our `b`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) transposed: [bool; 2],
    pub(super) dtype: DType,
    pub(super) result: DType,
    /// Of the two operands and the result, from a column to the next.
    pub(super) pitches: [usize; 3],
    /// The same three, in bytes.
    pub(super) alignment: [u32; 3],
}

impl Shape {
    /// The shape that stands for all of about this size: what is fastest for one of them is taken for all, since steps whose rows differ in
    /// length multiply matrices of ever new sizes.
    pub(super) fn class(&self) -> Self {
        let about = |n: usize| n.next_multiple_of(1 << n.max(1).ilog2().saturating_sub(3));
        let pitches = self.pitches.map(|pitch| pitch & 7);
        Self { m: about(self.m), n: about(self.n), k: about(self.k), pitches, ..*self }
    }
}

/// What a product computes, in the library's words.
pub(super) struct Matrices {
    pub(super) product: Product,
    pub(super) layouts: [Layout; 3],
}

// SAFETY: any thread may use the library's descriptors, and nothing changes them once they are made.
unsafe impl Send for Matrices {}
// SAFETY: as above.
unsafe impl Sync for Matrices {}

impl Matrices {
    pub(super) fn new(shape: &Shape) -> Result<Self> {
        let matrix = |dtype, rows, columns, transposed: bool, pitch| {
            if transposed { Layout::new(dtype, columns, rows, pitch) } else { Layout::new(dtype, rows, columns, pitch) }
        };
        let [a, b, c] = shape.pitches;
        let layouts = [
            matrix(shape.dtype, shape.m, shape.k, shape.transposed[0], a)?,
            matrix(shape.dtype, shape.k, shape.n, shape.transposed[1], b)?,
            matrix(shape.result, shape.m, shape.n, false, c)?,
        ];
        Ok(Self { product: Product::new(shape)?, layouts })
    }

    /// The algorithms that the library thinks fastest, the best first.
    pub(super) fn proposals(&self, library: sys::cublasLtHandle_t, shape: &Shape) -> Result<Vec<cublasLtMatmulAlgo_t>> {
        let preference = Preference::new(shape)?;
        let [a, b, c] = self.layouts.each_ref().map(|layout| layout.0);
        let mut found: Vec<cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(PROPOSALS);
        let mut count = 0;
        // SAFETY: all descriptors are alive; as many results as there is place for are written.
        let asked = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                library,
                self.product.0,
                a,
                b,
                c,
                c,
                preference.0,
                PROPOSALS as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        asked.result().map_err(failed)?;
        // SAFETY: so many were written.
        unsafe { found.set_len(usize::try_from(count).unwrap_or_default()) };
        Ok(found
            .into_iter()
            .filter(|one| one.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS)
            .map(|one| one.algo)
            .collect())
    }

    /// Whether an algorithm that was found for matrices of another size takes these.
    pub(super) fn takes(&self, library: sys::cublasLtHandle_t, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        let [a, b, c] = self.layouts.each_ref().map(|layout| layout.0);
        let mut found = MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: all descriptors are alive, and the result is written.
        let checked =
            unsafe { sys::cublasLtMatmulAlgoCheck(library, self.product.0, a, b, c, c, algorithm, found.as_mut_ptr()) };
        // SAFETY: it is a structure of numbers, of which zeros are some.
        let found = unsafe { found.assume_init() };
        checked == cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && found.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && found.workspaceSize <= WORKSPACE
    }
}

/// The library's descriptor of a product.
pub(super) struct Product(pub(super) sys::cublasLtMatmulDesc_t);

impl Product {
    fn new(shape: &Shape) -> Result<Self> {
        use cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        // f32 stays f32: this is not the mode that rounds it to TF32
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = Self(result::create_matmul_desc(compute, cudaDataType::CUDA_R_32F).map_err(failed)?);
        for (attribute, transposed) in
            [CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB].into_iter().zip(shape.transposed)
        {
            let operation = i32::from(transposed);
            let at = ptr::from_ref(&operation).cast();
            // SAFETY: the attribute is an enumeration of four bytes, 0 and 1 for as it is and transposed.
            unsafe { result::set_matmul_desc_attribute(product.0, attribute, at, size_of::<i32>()) }.map_err(failed)?;
        }
        Ok(product)
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed here alone.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// The library's descriptor of a column-major matrix whose columns are `pitch` elements apart.
pub(super) struct Layout(pub(super) sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, rows: usize, columns: usize, pitch: usize) -> Result<Self> {
        let element = match dtype {
            DType::BF16 => cudaDataType::CUDA_R_16BF,
            DType::F16 => cudaDataType::CUDA_R_16F,
            _ => cudaDataType::CUDA_R_32F,
        };
        result::create_matrix_layout(element, rows as u64, columns as u64, pitch as i64).map(Self).map_err(failed)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed here alone.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What the library may count on when it chooses an algorithm.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(shape: &Shape) -> Result<Self> {
        use cublasLtMatmulPreferenceAttributes_t::*;
        let preference = Self(result::create_matmul_pref().map_err(failed)?);
        let set = |attribute, at: *const c_void, bytes| {
            // SAFETY: a number of the attribute's size lies there.
            unsafe { result::set_matmul_pref_attribute(preference.0, attribute, at, bytes) }.map_err(failed)
        };
        let workspace = ptr::from_ref(&WORKSPACE).cast();
        set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace, size_of::<usize>())?;
        // parts of a sum are added in f32, never in the dtype of the result
        let reduction = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let [a, b, c] = &shape.alignment;
        for (attribute, value) in [
            (CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            set(attribute, ptr::from_ref(value).cast(), size_of::<u32>())?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed here alone.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

pub(super) fn failed(error: CublasError) -> Error {
    Error::Device { device: "cuBLASLt".into(), reason: error.to_string() }
}
