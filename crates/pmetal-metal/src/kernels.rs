//! A launcher for each kernel, generated from the texts' signatures.

use candle_core::{DType, Tensor};

use crate::{Access, Buffer, Call, Element, Gpu, Grid, Kernel, Result};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// What makes a kernel text Metal.
pub const METAL_PRELUDE: &str = include_str!("../kernels/prelude/metal.h");
/// What makes a kernel text CUDA C++.
pub const CUDA_PRELUDE: &str = include_str!("../kernels/prelude/cuda.h");
