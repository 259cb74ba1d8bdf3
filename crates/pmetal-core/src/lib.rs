//! What every other crate of PMetal stands on: the choice of device and dtype, and files that appear whole or not at all.

mod atomic;
mod device;
mod error;

pub use atomic::{StagedDir, StagedFile};
pub use device::{DTypeChoice, DeviceChoice};
pub use error::{Error, Result};
