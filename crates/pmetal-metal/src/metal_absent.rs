//! What stands in for Metal where there is none.

use std::sync::Arc;

use candle_core::{Device, MetalDevice};

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

fn absent() -> Error {
    Error::NotBuilt { device: "Metal", hint: "it needs macOS" }
}
