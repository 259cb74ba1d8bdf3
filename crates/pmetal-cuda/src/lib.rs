//! NVIDIA GPUs through candle's device: the kernel texts of `pmetal-metal` through NVRTC, attention on tensor cores, products by cuBLASLt.

#[cfg(not(feature = "cuda"))]
#[path = "absent.rs"]
mod device;
#[cfg(feature = "cuda")]
mod device;

pub use device::{Graph, capture, deterministic, gpu, is_out_of_memory, open};
