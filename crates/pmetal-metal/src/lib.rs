//! The kernels that run on GPUs, written once in a dialect of the Metal Shading Language, and how Metal runs them.
//!
//! `kernels/*.metal` are the texts; `kernels/prelude/` holds what makes them Metal or CUDA C++, and `pmetal-emulator` makes them plain C++
//! for tests. [`kernels`] has a launcher for each, generated from its signature. A device implements [`Gpu`]: launching, products, memory,
//! and attention on its matrix units. The dialect is described in `kernels/prelude/metal.h`.

mod attention;
mod attention_rows;
mod decoding;
mod error;
mod gpu;
mod kernel;
pub mod kernels;
mod low_rank;
mod marks;
#[cfg(target_os = "macos")]
mod metal;
#[cfg(not(target_os = "macos"))]
#[path = "metal_absent.rs"]
mod metal;
mod parts;
mod rest;

pub use attention::{attention_backward, attention_forward, limits, pitches};
pub use attention_rows::AttentionRows;
pub use decoding::{Decoding, Recording, RowAttention, RowProduct, RowStep};
pub use error::{Error, Result};
pub use gpu::{AttentionSpec, Facts, Gemm, Gpu, Memory, Reach, Statistics, empty};
pub use kernel::{Access, Buffer, Call, Element, Grid, Kernel, launches, pitch};
pub use low_rank::{
    LowRankBackward, LowRankGradient, LowRankMember, low_rank_forward, low_rank_inputs, low_rank_outputs,
};
pub use marks::{HostMarks, Marks};
pub use metal::{exact, exact_zeros, gpu, open};
pub use parts::{Part, PartTable};
pub use rest::Resting;
