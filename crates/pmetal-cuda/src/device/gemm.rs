//! Matrix products by cuBLASLt, by whichever of its algorithms is the fastest here.

mod matrices;

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{Arc, PoisonError, RwLock, atomic::Ordering::Relaxed},
};

use candle_core::{
    Device, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublaslt::{
                result::{self, CublasError},
                sys::{self, cublasLtMatmulAlgo_t, cublasStatus_t},
            },
            driver::{
                CudaSlice, CudaStream, DevicePtr,
                sys::{CUdeviceptr, CUevent_flags, CUstreamCaptureStatus},
            },
        },
    },
};
use pmetal_metal::{Gemm, Result, pitch};

use self::matrices::{Matrices, Shape, WORKSPACE, failed};
use super::{CudaGpu, DETERMINISTIC};

/// Smaller products take no longer than their launch.
const WORTH_MEASURING: usize = 1 << 24;

/// The library, its workspace, and how each product seen so far is computed.
pub(super) struct Products {
    library: sys::cublasLtHandle_t,
    /// One for all products: the stream runs them one after the other.
    workspace: CudaSlice<u8>,
    plans: RwLock<HashMap<Shape, Arc<Plan>>>,
    /// The algorithm for all products of about one size.
    algorithms: RwLock<HashMap<Shape, cublasLtMatmulAlgo_t>>,
}

// SAFETY: any thread may use the library's handle.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed here alone; there is nothing to do about an error.
        let _ = unsafe { result::destroy_handle(self.library) };
    }
}

impl Products {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        // SAFETY: the library writes before it reads.
        let workspace = unsafe { stream.alloc(WORKSPACE) }.w()?;
        let library = result::create_handle().map_err(failed)?;
        Ok(Self { library, workspace, plans: RwLock::default(), algorithms: RwLock::default() })
    }

    /// Asks for a product behind all that was asked for before.
    pub(super) fn run(&self, gpu: &CudaGpu, product: &Gemm) -> Result<()> {
        let [m, n, k] = product.sizes()?;
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
            pitches: [product.b, product.a, product.c].map(|matrix| pitch(matrix).unwrap_or_default()),
            alignment: [b, a, c].map(|address| 1 << address.trailing_zeros().min(8)),
        };
        let work = Work { operands: [b, a, c], to: c, factors: [product.alpha, product.beta] };
        let plan = self.plan(gpu, &shape, &work)?;
        gpu.context.bind_to_thread().w()?;
        self.ask(gpu, &plan.matrices, &plan.algorithm, &work).map_err(failed)
    }

    fn ask(
        &self,
        gpu: &CudaGpu,
        Matrices { product, layouts: [a, b, c] }: &Matrices,
        algorithm: &cublasLtMatmulAlgo_t,
        work: &Work,
    ) -> Result<(), CublasError> {
        let [alpha, beta] = work.factors.each_ref().map(|factor| ptr::from_ref(factor).cast());
        let [at_a, at_b, at_c] = work.operands.map(|address| address as *const c_void);
        // SAFETY: the layouts are those of the operands, whose sizes and dtypes were checked; see `CudaGpu::address` for their memory. The
        // factors are read before the call returns.
        unsafe {
            result::matmul(
                self.library,
                product.0,
                alpha,
                beta,
                at_a,
                a.0,
                at_b,
                b.0,
                at_c,
                c.0,
                work.to as *mut c_void,
                c.0,
                algorithm,
                self.workspace.device_ptr(&gpu.stream).0 as *mut c_void,
                WORKSPACE,
                gpu.stream.cu_stream().cast(),
            )
        }
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

    fn plan(&self, gpu: &CudaGpu, shape: &Shape, work: &Work) -> Result<Arc<Plan>> {
        if let Some(plan) = self.plans.read().unwrap_or_else(PoisonError::into_inner).get(shape) {
            return Ok(plan.clone());
        }
        let matrices = Matrices::new(shape)?;
        let algorithm = self.algorithm(gpu, shape, &matrices, work)?;
        let plan = Arc::new(Plan { matrices, algorithm });
        self.plans.write().unwrap_or_else(PoisonError::into_inner).insert(*shape, plan.clone());
        Ok(plan)
    }

    fn algorithm(
        &self,
        gpu: &CudaGpu,
        shape: &Shape,
        matrices: &Matrices,
        work: &Work,
    ) -> Result<cublasLtMatmulAlgo_t> {
        let class = shape.class();
        if let Some(known) = self.algorithms.read().unwrap_or_else(PoisonError::into_inner).get(&class)
            && matrices.takes(self.library, known)
        {
            return Ok(*known);
        }
        let proposed = matrices.proposals(self.library, shape)?;
        let Some(best) = self.fastest(gpu, shape, matrices, &proposed, work) else {
            let first = proposed.first();
            return first.copied().ok_or_else(|| failed(CublasError(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        };
        self.algorithms.write().unwrap_or_else(PoisonError::into_inner).insert(class, best);
        Ok(best)
    }

    /// The proposed algorithm that took the least time on the operands themselves, or the library's first choice where that is as good; none
    /// where it is not to be measured.
    fn fastest(
        &self,
        gpu: &CudaGpu,
        shape: &Shape,
        matrices: &Matrices,
        proposed: &[cublasLtMatmulAlgo_t],
        work: &Work,
    ) -> Option<cublasLtMatmulAlgo_t> {
        let captured = gpu.stream.capture_status().ok()? != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if captured
            || DETERMINISTIC.load(Relaxed)
            || proposed.len() < 2
            || shape.m * shape.n * shape.k < WORTH_MEASURING
        {
            return None;
        }
        // what is added to must not change: then the results go elsewhere
        let elsewhere: Option<CudaSlice<u8>> = match work.factors[1] {
            0.0 => None,
            // SAFETY: the products write it, nothing reads it.
            _ => Some(unsafe { gpu.stream.alloc(shape.pitches[2] * shape.n * shape.result.size_in_bytes()) }.ok()?),
        };
        let to = elsewhere.as_ref().map_or(work.to, |elsewhere| elsewhere.device_ptr(&gpu.stream).0);
        let work = Work { to, ..*work };
        let times: Vec<f32> = proposed.iter().map(|algorithm| self.time(gpu, matrices, algorithm, &work)).collect();
        let again = proposed.iter().map(|algorithm| self.time(gpu, matrices, algorithm, &work));
        let times: Vec<f32> = times.iter().zip(again).map(|(first, second)| first.min(second)).collect();
        let best = (0..times.len()).min_by(|&i, &j| times[i].total_cmp(&times[j]))?;
        // less may be chance
        Some(proposed[if times[best] < 0.97 * times[0] { best } else { 0 }])
    }

    /// How long an algorithm takes; forever where it fails.
    fn time(&self, gpu: &CudaGpu, matrices: &Matrices, algorithm: &cublasLtMatmulAlgo_t, work: &Work) -> f32 {
        let ask = || self.ask(gpu, matrices, algorithm, work).ok();
        let mark = || gpu.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).ok();
        let measure = || {
            ask()?;
            let start = mark()?;
            (0..3).try_for_each(|_| ask())?;
            start.elapsed_ms(&mark()?).ok()
        };
        measure().unwrap_or(f32::INFINITY)
    }
}

/// What a product reads, in the library's order, where its result goes, and `alpha` and `beta`.
#[derive(Clone, Copy)]
struct Work {
    operands: [CUdeviceptr; 3],
    to: CUdeviceptr,
    factors: [f32; 2],
}

/// How a product is computed.
struct Plan {
    matrices: Matrices,
    algorithm: cublasLtMatmulAlgo_t,
}

/// The library's version, as in `13.0.2`.
pub(super) fn version() -> String {
    // SAFETY: it takes nothing and returns a number.
    let version = unsafe { sys::cublasLtGetVersion() };
    format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
}
