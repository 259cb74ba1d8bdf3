//! The shared kernel texts on a CUDA device.

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{PoisonError, RwLock},
};

use candle_core::{
    DType,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, result, sys},
    },
};
use pmetal_metal::{
    Call, Error, Kernel, Result,
    kernels::{ALL, CUDA_PRELUDE, TEXTS},
};

use super::CudaGpu;

/// The kernels that were asked for, compiled: a file and a dtype at a time.
#[derive(Default)]
pub(super) struct Kernels {
    functions: RwLock<HashMap<(&'static str, DType), CudaFunction>>,
}

impl Kernels {
    /// Asks for a kernel's work behind all that was asked for before.
    pub(super) fn launch(&self, gpu: &CudaGpu, call: &Call) -> Result<()> {
        let function = self.function(gpu, call.kernel, call.dtype)?;
        ask(gpu, call, function, call.grid.groups, call.grid.threads)
    }

    fn function(&self, gpu: &CudaGpu, kernel: &'static Kernel, dtype: DType) -> Result<sys::CUfunction> {
        let key = (kernel.name, dtype);
        if let Some(function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(function.cu_function());
        }
        let module = gpu.compile(kernel.file, &text(kernel.file, dtype)?, &[])?;
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        for sibling in ALL.iter().filter(|sibling| sibling.file == kernel.file) {
            functions.insert((sibling.name, dtype), module.load_function(sibling.name).w()?);
        }
        functions.get(&key).map(CudaFunction::cu_function).ok_or_else(|| missing(kernel.name))
    }
}

/// Asks for a call's work by `function`, a kernel with the call's arguments, behind all that was asked for before.
pub(super) fn ask(
    gpu: &CudaGpu,
    call: &Call,
    function: sys::CUfunction,
    groups: [usize; 3],
    threads: usize,
) -> Result<()> {
    let mut addresses = call.buffers.iter().map(|tensor| gpu.address(tensor)).collect::<Result<Vec<_>>>()?;
    let mut arguments: Vec<*mut c_void> = addresses.iter_mut().map(|at| ptr::from_mut(at).cast()).collect();
    arguments.push(call.params.as_ptr().cast_mut().cast());
    gpu.context.bind_to_thread().w()?;
    let threads = (size(gpu, threads)?, 1, 1);
    let [x, y, z] = groups;
    let groups = (size(gpu, x)?, size(gpu, y)?, size(gpu, z)?);
    // SAFETY: the launcher is generated from the kernel's text, so the arguments are those of its signature, checked for dtype and layout;
    // the driver has copied them when it returns. See `CudaGpu::address` for the memory they point to.
    let launched =
        unsafe { result::launch_kernel(function, groups, threads, 0, gpu.stream.cu_stream(), &mut arguments) };
    Ok(launched.w()?)
}

/// A kernel file as CUDA C++.
fn text(file: &'static str, dtype: DType) -> Result<String> {
    let element = element(dtype)?;
    let (_, text) = TEXTS.iter().find(|(name, _)| *name == file).ok_or_else(|| missing(file))?;
    Ok(format!("{CUDA_PRELUDE}\ntypedef {element} T;\n#line 1 \"{file}\"\n{text}"))
}

/// The type of a dtype's elements in the dialect.
pub(super) fn element(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float"),
        DType::F16 => Ok("half"),
        DType::BF16 => Ok("bfloat"),
        other => Err(Error::Device { device: "CUDA".into(), reason: format!("no kernels for {other:?}") }),
    }
}

/// Every file in every dtype.
#[cfg(test)]
pub(super) fn all_texts() -> Result<Vec<(String, String)>> {
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let each = dtypes.iter().flat_map(|&dtype| TEXTS.iter().map(move |(file, _)| (file, dtype)));
    each.map(|(file, dtype)| Ok((format!("{file} in {dtype:?}"), text(file, dtype)?))).collect()
}

fn missing(name: &str) -> Error {
    Error::Device { device: "CUDA".into(), reason: format!("there is no kernel text {name}") }
}

/// A number of threadgroups or threads as the driver takes it.
pub(super) fn size(gpu: &CudaGpu, n: usize) -> Result<u32> {
    let refuse = |_| Error::Device { device: gpu.name(), reason: format!("a grid of {n} threadgroups is too large") };
    u32::try_from(n).map_err(refuse)
}
