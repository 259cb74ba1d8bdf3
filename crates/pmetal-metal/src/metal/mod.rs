//! Metal through candle's device.

use std::sync::Arc;

use candle_core::{Device, MetalDevice};

use crate::{Gpu, Result};

/// The default Metal device.
pub fn open() -> Result<Device> {
    Ok(Device::new_metal(0)?)
}

/// The device as operations use it.
pub fn gpu(_: &MetalDevice) -> Result<Arc<dyn Gpu>> {
    todo!()
}
