//! Matrix products by cuBLASLt.

use std::{
    collections::HashMap,
    ffi::c_void,
    mem::size_of,
    ptr,
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{
    DType, Device, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublaslt::{
                result::{self, CublasError},
                sys::{
                    self, cublasComputeType_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t,
                    cublasLtMatmulPreferenceAttributes_t, cudaDataType,
                },
            },
            driver::{CudaSlice, CudaStream, DevicePtr},
        },
    },
};
use pmetal_metal::{Error, Gemm, Result};

use super::CudaGpu;

/// Bytes that a product may use beside its operands: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// The library, its workspace, and how each product seen so far is computed.
pub(super) struct Products {
    library: sys::cublasLtHandle_t,
    /// One for all products: the stream runs them one after the other.
    workspace: CudaSlice<u8>,
    plans: RwLock<HashMap<Shape, Arc<Plan>>>,
}

// SAFETY: the library's handle and descriptors may be used from any thread; nothing changes a descriptor once its plan is made.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed here alone; there is nothing to do about an error.
        let _ = unsafe { result::destroy_handle(self.library) };
    }
}

/// What a plan depends on, in the column-major words of the library: its first operand is our `b`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    transposed: [bool; 2],
    dtype: DType,
    result: DType,
    /// Of the two operands and the result, in bytes.
    alignment: [u32; 3],
}

impl Products {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        // SAFETY: the library writes before it reads.
        let workspace = unsafe { stream.alloc(WORKSPACE) }.w()?;
        let library = result::create_handle().map_err(failed)?;
        Ok(Self { library, workspace, plans: RwLock::default() })
    }

    /// Asks for a product behind all that was asked for before.
    pub(super) fn run(&self, gpu: &CudaGpu, product: &Gemm) -> Result<()> {
        let [m, n, k] = sizes(product)?;
        if m == 0 || n == 0 {
            return Ok(());
        }
        if k == 0 {
            return self.scale(gpu, product, m, n);
        }
        let [a, b, c] = [gpu.address(product.a)?, gpu.address(product.b)?, gpu.address(product.c)?];
        let shape = Shape {
            m: n,
            n: m,
            k,
            transposed: [product.b_transposed, product.a_transposed],
            dtype: product.a.dtype(),
            result: product.c.dtype(),
            alignment: [b, a, c].map(|address| 1 << address.trailing_zeros().min(8)),
        };
        let plan = self.plan(&shape)?;
        gpu.context.bind_to_thread().w()?;
        let stream = &gpu.stream;
        // SAFETY: the plan's layouts are those of the operands, whose sizes and dtypes were checked; see `CudaGpu::address` for their
        // memory. The factors are read before the call returns.
        let asked = unsafe {
            result::matmul(
                self.library,
                plan.product.0,
                ptr::from_ref(&product.alpha).cast(),
                ptr::from_ref(&product.beta).cast(),
                b as *const c_void,
                plan.layouts[0].0,
                a as *const c_void,
                plan.layouts[1].0,
                c as *const c_void,
                plan.layouts[2].0,
                c as *mut c_void,
                plan.layouts[2].0,
                &plan.algorithm,
                self.workspace.device_ptr(stream).0 as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        };
        asked.map_err(failed)
    }

    /// The product of matrices without columns and rows is zero.
    fn scale(&self, gpu: &CudaGpu, product: &Gemm, m: usize, n: usize) -> Result<()> {
        if product.beta == 1.0 {
            return Ok(());
        }
        let device = Device::Cuda(gpu.device.clone());
        let a = &Tensor::zeros((m, 1), product.a.dtype(), &device)?;
        let b = &Tensor::zeros((1, n), product.a.dtype(), &device)?;
        self.run(gpu, &Gemm { a, a_transposed: false, b, b_transposed: false, ..*product })
    }

    fn plan(&self, shape: &Shape) -> Result<Arc<Plan>> {
        if let Some(plan) = self.plans.read().unwrap_or_else(PoisonError::into_inner).get(shape) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(Plan::new(self.library, shape)?);
        self.plans.write().unwrap_or_else(PoisonError::into_inner).insert(*shape, plan.clone());
        Ok(plan)
    }
}

/// How a product is computed.
struct Plan {
    product: Product,
    layouts: [Layout; 3],
    algorithm: cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(library: sys::cublasLtHandle_t, shape: &Shape) -> Result<Self> {
        let product = Product::new(shape)?;
        let matrix = |dtype, rows, columns, transposed: bool| {
            if transposed { Layout::new(dtype, columns, rows) } else { Layout::new(dtype, rows, columns) }
        };
        let layouts = [
            matrix(shape.dtype, shape.m, shape.k, shape.transposed[0])?,
            matrix(shape.dtype, shape.k, shape.n, shape.transposed[1])?,
            matrix(shape.result, shape.m, shape.n, false)?,
        ];
        let preference = Preference::new(shape)?;
        let [a, b, c] = layouts.each_ref().map(|layout| layout.0);
        // SAFETY: all descriptors are alive.
        let best = unsafe { result::get_matmul_algo_heuristic(library, product.0, a, b, c, c, preference.0) };
        Ok(Self { algorithm: best.map_err(failed)?.algo, product, layouts })
    }
}

/// The library's descriptor of a product.
struct Product(sys::cublasLtMatmulDesc_t);

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

/// The library's descriptor of a column-major matrix without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: DType, rows: usize, columns: usize) -> Result<Self> {
        let element = match dtype {
            DType::BF16 => cudaDataType::CUDA_R_16BF,
            DType::F16 => cudaDataType::CUDA_R_16F,
            _ => cudaDataType::CUDA_R_32F,
        };
        result::create_matrix_layout(element, rows as u64, columns as u64, rows as i64).map(Self).map_err(failed)
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
        let [a, b, c] = &shape.alignment;
        for (attribute, bytes) in [
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            set(attribute, ptr::from_ref(bytes).cast(), size_of::<u32>())?;
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

/// `[m, n, k]` of a product whose operands fit each other.
fn sizes(product: &Gemm) -> Result<[usize; 3]> {
    let of = |tensor: &Tensor, transposed: bool| -> Result<(usize, usize)> {
        let (rows, columns) = tensor.dims2()?;
        Ok(if transposed { (columns, rows) } else { (rows, columns) })
    };
    let (m, k) = of(product.a, product.a_transposed)?;
    let (b_k, n) = of(product.b, product.b_transposed)?;
    let dtype = product.a.dtype();
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Err(misfit("a", "f32, f16 or bf16".into(), product.a));
    }
    if b_k != k || product.b.dtype() != dtype {
        return Err(misfit("b", format!("[{k}, n] of {dtype:?} after transposing"), product.b));
    }
    if product.c.dims2()? != (m, n) || ![dtype, DType::F32].contains(&product.c.dtype()) {
        return Err(misfit("c", format!("[{m}, {n}] of {dtype:?} or F32"), product.c));
    }
    for (name, tensor) in [("a", product.a), ("b", product.b), ("c", product.c)] {
        if !tensor.is_contiguous() {
            return Err(misfit(name, "contiguous".into(), tensor));
        }
    }
    Ok([m, n, k])
}

fn misfit(buffer: &'static str, expected: String, tensor: &Tensor) -> Error {
    let got = format!("{:?} of {:?}, strides {:?}", tensor.dims(), tensor.dtype(), tensor.stride());
    Error::Buffer { kernel: "gemm", buffer, expected, got }
}

/// The library's version, as in `13.0.2`.
pub(super) fn version() -> String {
    // SAFETY: it takes nothing and returns a number.
    let version = unsafe { sys::cublasLtGetVersion() };
    format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
}

fn failed(error: CublasError) -> Error {
    Error::Device { device: "cuBLASLt".into(), reason: error.to_string() }
}
