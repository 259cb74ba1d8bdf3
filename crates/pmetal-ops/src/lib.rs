//! Autograd over candle's tensors and the fused operations of PMetal.
//!
//! One file per operation holds its formula, forward, backward, the choice of path, the plain-candle reference, and the tests.
//! A fused kernel is an optimisation of the reference and never the only way: a device or dtype without one runs the reference through
//! [`composite`].
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use pmetal_ops::{RmsNorm, Value, gradients, rms_norm};
//!
//! # fn main() -> pmetal_ops::Result<()> {
//! let x = Value::variable(Tensor::new(&[[3f32, 4.0]], &Device::Cpu)?);
//! let weight = Value::constant(Tensor::new(&[1f32, 1.0], &Device::Cpu)?);
//! let y = rms_norm(&x, &weight, RmsNorm::new(0.0), 0)?;
//! let dy = y.tensor().ones_like()?;
//! let dx = gradients(vec![(y, dy)], &[&x])?;
//! assert!(dx[0].is_some());
//! # Ok(())
//! # }
//! ```

mod adamw;
mod attention;
pub mod autograd;
pub mod decoding;
pub mod device;
pub mod doctor;
mod elementwise;
mod embedding;
mod error;
mod experts;
mod gated_activation;
mod heads;
mod kernel;
mod kv_cache;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod logits;
mod norm_rope;
mod normal;
mod param;
mod parts;
mod place;
pub mod profile;
mod rates;
mod rms_norm;
mod rope;
mod routing;
mod row_sums;
mod rows;
mod sampler;
mod scaled;
#[cfg(test)]
mod testing;
mod weight;

pub use adamw::{AdamW, StepOutcome, adamw};
pub use attention::{AttentionSpec, Reach, Rows, attention, sparse_attention, top_keys};
pub use autograd::{Fate, Policy, Saved, Value, backward, checkpoint, composite, gradients, no_grad};
pub use embedding::embedding;
pub use error::{Error, Result};
pub use experts::Experts;
pub use gated_activation::{Activation, gated_activation};
pub use heads::{cut_heads, join_heads, join_heads_with_shared, pad_heads, product_by_heads};
pub use kv_cache::write_rows;
pub use layer_norm::layer_norm;
pub use linear::{Adapter, LinearGroup, LinearMember};
pub use linear_cross_entropy::{CrossEntropy, LOGITS_BYTES, linear_cross_entropy, linear_cross_entropy_within};
pub use logits::{LogitsSpec, logits};
pub use norm_rope::rms_norm_rope;
pub use normal::normal_on_gpu;
pub use param::{Arena, Param};
pub use parts::{join_columns, join_rows, split_columns, split_rows};
pub use place::{emulate, switch_off, uploads_kept};
pub use rates::{DeviceRates, rates};
pub use rms_norm::{RmsNorm, add_rms_norm, rms_norm, rms_norm_beside, rms_norm_heads};
pub use rope::{RopeAngles, RopeLayout, RopeTable, rope};
pub use routing::{Groups, Routed, RouterSpec, Scoring, route, router_loss};
pub use row_sums::{combine_rows, gather_rows};
pub use sampler::{Sampler, Sampling};
pub use scaled::{scaled, scaled_rows};
pub use weight::{MappedFile, MappedWeight, Weight};

/// Bytes that live and lived, where the program installs [`pmetal_cpu`]'s allocator.
pub mod memory {
    pub use pmetal_cpu::{PoolAllocator, live_bytes, peak_bytes, reset_peak};
}

/// Counter-based randomness: numbers are functions of a seed and a place, so nothing has to be restored on resume and the
/// number of threads does not matter.
pub mod random {
    pub use pmetal_cpu::{mix, normal, uniform};
}
