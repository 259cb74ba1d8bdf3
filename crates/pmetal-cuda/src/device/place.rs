//! Adapters at their places in all matrices of a model by one launch: `kernels/place.cu`.

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{PoisonError, RwLock},
};

use candle_core::{
    DType, Device, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, result, sys},
    },
};
use pmetal_metal::{Part, PartTable, Result, kernels::CUDA_PRELUDE};

use super::{
    CudaGpu,
    kernels::{element, size},
};

const NAME: &str = "place.cu";
const TEXT: &str = include_str!("../../kernels/place.cu");

/// Words of 32 bits of a row of the table.
const WORDS: usize = 8;
const THREADS: usize = 256;

/// The kernel, compiled for the dtypes that were asked for.
#[derive(Default)]
pub(super) struct Placing {
    built: RwLock<HashMap<DType, CudaFunction>>,
}

/// As [`pmetal_metal::Gpu::part_table`].
pub(super) fn table(gpu: &CudaGpu, parts: &[Part]) -> Result<Option<PartTable>> {
    let [first, ..] = parts else { return Ok(None) };
    let (dtype, mut largest) = (first.matrix.dtype(), 0);
    let mut words: Vec<u32> = Vec::with_capacity(WORDS * parts.len());
    for part in parts {
        let (rows, pitch) = part.matrix.dims2()?;
        let fits = part.row + part.rows <= rows && part.column + part.columns <= pitch;
        let one_kind = part.matrix.dtype() == dtype && part.matrix.is_contiguous();
        let numbers = [part.rows, part.columns, pitch, part.rows * part.columns].map(u32::try_from);
        let [Ok(rows), Ok(columns), Ok(pitch_number), Ok(_)] = numbers else { return Ok(None) };
        if !(fits && one_kind) {
            return Ok(None);
        }
        let at = (part.row * pitch + part.column) * dtype.size_in_bytes();
        let to = gpu.address(part.matrix)? + at as u64;
        for long in [to, part.first as u64] {
            words.extend([long as u32, (long >> 32) as u32]);
        }
        words.extend([rows, columns, pitch_number, 0]);
        largest = largest.max(part.rows * part.columns);
    }
    let table = Tensor::from_slice(&words, words.len(), &Device::Cuda(gpu.device.clone()))?;
    Ok(Some(PartTable { table, count: parts.len(), largest, dtype }))
}

impl Placing {
    /// As [`pmetal_metal::Gpu::place`].
    pub(super) fn run(&self, gpu: &CudaGpu, values: &Tensor, table: &PartTable) -> Result<()> {
        let function = self.function(gpu, table.dtype)?;
        let mut addresses = [gpu.address(values)?, gpu.address(&table.table)?];
        let mut arguments = addresses.each_mut().map(|at| ptr::from_mut(at).cast::<c_void>());
        let groups = (size(gpu, table.largest.div_ceil(4 * THREADS).clamp(1, 64))?, size(gpu, table.count)?, 1);
        let threads = (size(gpu, THREADS)?, 1, 1);
        gpu.context.bind_to_thread().w()?;
        // SAFETY: the arguments are those of the kernel's signature, and the table was made for matrices that are still there: see
        // `pmetal_metal::Gpu::place`.
        let launched =
            unsafe { result::launch_kernel(function, groups, threads, 0, gpu.stream.cu_stream(), &mut arguments) };
        Ok(launched.w()?)
    }

    fn function(&self, gpu: &CudaGpu, dtype: DType) -> Result<sys::CUfunction> {
        if let Some(function) = self.built.read().unwrap_or_else(PoisonError::into_inner).get(&dtype) {
            return Ok(function.cu_function());
        }
        let text = format!("{CUDA_PRELUDE}\ntypedef {} T;\n#line 1 \"{NAME}\"\n{TEXT}", element(dtype)?);
        let function = gpu.compile(NAME, &text, &[])?.load_function("place_all").w()?;
        let handle = function.cu_function();
        self.built.write().unwrap_or_else(PoisonError::into_inner).insert(dtype, function);
        Ok(handle)
    }
}
