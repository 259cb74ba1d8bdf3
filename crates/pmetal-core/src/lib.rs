//! What every other crate of PMetal stands on: the choice of device and dtype, and files that appear whole or not at all.

mod atomic;
mod cache;
mod device;
mod error;
mod machine;
mod sniff;

pub use atomic::{StagedDir, StagedFile};
pub use cache::cache_folder;
pub use device::{DTypeChoice, DeviceChoice};
pub use error::{Error, Result, next_step};
pub use machine::{cpu_name, system, total_memory};
pub use sniff::what_it_is;
