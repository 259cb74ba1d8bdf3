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

/// Whether every run is to give the same bits: of no effect.
pub fn deterministic(_: bool) {}

/// Whether an error says that the GPU's memory is full: never.
pub fn is_out_of_memory(_: &candle_core::Error) -> bool {
    false
}

/// What was captured, of which there is none.
pub enum Graph {}

impl Graph {
    /// Asks for all that was captured.
    pub fn replay(&self) -> Result<()> {
        match *self {}
    }
}

/// Captures what `f` asks of a device.
///
/// # Errors
/// Always: this build has no CUDA.
pub fn capture<E: From<Error>>(_: &Device, _: impl FnMut() -> Result<(), E>) -> Result<Graph, E> {
    Err(absent().into())
}

fn absent() -> Error {
    Error::NotBuilt { device: "CUDA", hint: "build with --features cuda, or use the binary for NVIDIA GPUs" }
}
