//! Device memory: how much is used, and whether an error says that there is no more.

use std::{ptr, sync::Arc};

use candle_core::cuda_backend::{
    CudaError, WrapErr,
    cudarc::{
        cublas,
        driver::{
            CudaContext, DriverError,
            result::{device, mem_pool},
            sys::{self, CUgraphMem_attribute, CUmemPool_attribute},
        },
    },
};
use pmetal_metal::{Memory, Result};

/// The pool that candle's tensors come from, and the memory of graphs beside it.
pub(super) struct Pool {
    pool: sys::CUmemoryPool,
    device: sys::CUdevice,
}

// SAFETY: a handle of the driver, whose calls any thread may make.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// The device's own pool. From now on it keeps what tensors give back: the next step asks for the same again.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let device = context.cu_device();
        // SAFETY: the device is the context's.
        let pool = Self { pool: unsafe { device::get_mem_pool(device) }.w()?, device };
        pool.set(CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
        Ok(pool)
    }

    /// What is used by tensors, and may be used by this process.
    pub(super) fn memory(&self, context: &Arc<CudaContext>) -> Result<Memory> {
        let (free, _) = context.mem_get_info().w()?;
        let reserved = self.get(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            + self.graphs(CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT)?;
        Ok(Memory {
            live: self.get(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?
                + self.graphs(CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT)?,
            peak: self.get(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?
                + self.graphs(CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH)?,
            total: free as u64 + reserved,
        })
    }

    /// Starts the peaks anew.
    pub(super) fn reset_peak(&self) -> Result<()> {
        self.set(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
        let mut zero = 0u64;
        let high = CUgraphMem_attribute::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a u64; 0 resets it.
        let reset = unsafe { sys::cuDeviceSetGraphMemAttribute(self.device, high, ptr::from_mut(&mut zero).cast()) };
        Ok(reset.result().w()?)
    }

    /// Gives back what no tensor uses, so that graphs can have it.
    pub(super) fn trim(&self) -> Result<()> {
        // SAFETY: the pool is the device's own, which lives as long as the driver.
        Ok(unsafe { mem_pool::trim_to(self.pool, 0) }.w()?)
    }

    fn get(&self, attribute: CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the attributes asked for are u64.
        unsafe { mem_pool::get_attribute(self.pool, attribute, ptr::from_mut(&mut value).cast()) }.w()?;
        Ok(value)
    }

    fn set(&self, attribute: CUmemPool_attribute, mut value: u64) -> Result<()> {
        // SAFETY: the attributes set are u64.
        Ok(unsafe { mem_pool::set_attribute(self.pool, attribute, ptr::from_mut(&mut value).cast()) }.w()?)
    }

    fn graphs(&self, attribute: CUgraphMem_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the attributes asked for are u64.
        let read =
            unsafe { sys::cuDeviceGetGraphMemAttribute(self.device, attribute, ptr::from_mut(&mut value).cast()) };
        read.result().w()?;
        Ok(value)
    }
}

/// Whether an error says that the GPU's memory is full.
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    let full = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    match cuda_error(error) {
        Some(CudaError::Cuda(error) | CudaError::Load { cuda: error, .. }) => error.0 == full,
        Some(CudaError::Cublas(error)) => error.0 == cublas::sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED,
        _ => false,
    }
}

/// The driver's error behind candle's.
pub(super) fn driver_error(error: &candle_core::Error) -> Option<DriverError> {
    match cuda_error(error)? {
        CudaError::Cuda(error) => Some(*error),
        _ => None,
    }
}

fn cuda_error(error: &candle_core::Error) -> Option<&CudaError> {
    use candle_core::Error;
    match error {
        Error::Cuda(error) => error.downcast_ref(),
        Error::WithBacktrace { inner, .. } | Error::WithPath { inner, .. } | Error::Context { inner, .. } => {
            cuda_error(inner)
        }
        Error::WrappedContext { wrapped, .. } => cuda_error(wrapped.downcast_ref()?),
        _ => None,
    }
}
