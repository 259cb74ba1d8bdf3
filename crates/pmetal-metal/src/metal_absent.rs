//! What stands in for Metal where there is none.

use std::sync::Arc;

use candle_core::{DType, Device, MetalDevice, Shape, Tensor};

use crate::{Error, Gpu, Result};

/// The default Metal device.
///
/// # Errors
/// Always: this build is not for macOS.
pub fn open() -> Result<Device> {
    Err(absent())
}

/// The device as operations use it.
///
/// # Errors
/// Always: this build is not for macOS.
pub fn gpu(_: &MetalDevice) -> Result<Arc<dyn Gpu>> {
    Err(absent())
}

/// A tensor of the host in a buffer of its exact size.
///
/// # Errors
/// Where the device has no room for it.
pub fn exact(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    Ok(tensor.to_device(device)?)
}

/// Zeros on `device`, in a buffer of their own size: for arenas.
///
/// # Errors
/// When the device has no room for them.
pub fn exact_zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, dtype, device)?)
}

/// Asks for room for a buffer: there is no such device.
pub(crate) fn reserve(_: &MetalDevice, _: usize) -> Result<()> {
    Err(absent())
}

fn absent() -> Error {
    Error::NotBuilt { device: "Metal", hint: "it needs macOS" }
}
