//! A CUDA device.

use std::sync::Arc;

use candle_core::{CudaDevice, Device};
use pmetal_metal::{Gpu, Result};

/// CUDA device `ordinal`.
pub fn open(ordinal: usize) -> Result<Device> {
    Ok(Device::new_cuda_with_stream(ordinal)?)
}

/// The device as operations use it.
pub fn gpu(_: &CudaDevice) -> Result<Arc<dyn Gpu>> {
    todo!()
}
