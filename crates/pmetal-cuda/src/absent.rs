//! What stands in for CUDA where the build leaves it out.

use std::sync::Arc;

use candle_core::{CudaDevice, Device};
use pmetal_metal::{Error, Gpu, Result};

/// CUDA device `ordinal`.
///
/// # Errors
/// Always: this build has no CUDA.
pub fn open(_ordinal: usize) -> Result<Device> {
    Err(absent())
}

/// The device as operations use it.
///
/// # Errors
/// Always: this build has no CUDA.
pub fn gpu(_: &CudaDevice) -> Result<Arc<dyn Gpu>> {
    Err(absent())
}

fn absent() -> Error {
    Error::NotBuilt { device: "CUDA", hint: "build with --features cuda, or use the binary for NVIDIA GPUs" }
}
