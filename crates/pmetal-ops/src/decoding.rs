//! One new token at a time, by kernels that do several operations in one step, each of which begins before the one in front of it has ended:
//! where a device has them, reading the weights is nearly all that a token takes.
//!
//! The formulas are those of [`rms_norm`](crate::rms_norm), [`LinearGroup`](crate::LinearGroup), [`rope`](crate::rope),
//! [`attention`](crate::attention) and [`gated_activation`](crate::gated_activation); nothing is recorded for a gradient, results are written
//! into tensors that were there before.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
pub use pmetal_metal::{AttentionSpec, RowAttention, RowProduct, RowStep};
use pmetal_metal::{Error as GpuError, Gpu};

use crate::{
    Result,
    embedding::gather_into,
    place::{gpu_of, is_off},
    profile,
};

const OP: &str = "decoding";

/// A device with such kernels.
pub struct Decoding(Arc<dyn Gpu>);

impl Decoding {
    /// The device, where it has kernels for a model of `dtype` whose heads are `spec`'s and whose linear layers read rows as wide as
    /// `widths`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn on(device: &Device, dtype: DType, spec: &AttentionSpec, widths: &[usize]) -> Result<Option<Self>> {
        let Some(gpu) = gpu_of(device)?.filter(|_| !is_off(OP)) else { return Ok(None) };
        let fits = match gpu.decoding() {
            Some(decoding) => decoding.decodes(dtype, spec, widths)?,
            None => false,
        };
        Ok(fits.then_some(Self(gpu)))
    }

    /// Copies the row of `table [vocab, hidden]` that `id [1]` (u32, below `vocab`) names to `y [1, hidden]`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn embed(&self, id: &Tensor, table: &Tensor, y: &Tensor) -> Result<()> {
        let _span = profile::span("embedding");
        gather_into(&*self.0, id, table, y)
    }

    /// Makes steps ready to be asked for, each behind the one before, on the memory that their tensors have now: whoever keeps the recording
    /// keeps the tensors.
    ///
    /// # Errors
    /// Where an operand does not fit the others or the device fails.
    pub fn record(&self, steps: &[RowStep]) -> Result<Recording> {
        let hint = "it has no kernels for one token";
        let kernels = self.0.decoding().ok_or(GpuError::NotBuilt { device: "this GPU", hint })?;
        let (mut flops, mut bytes) = (0.0, 0.0);
        for step in steps {
            let RowStep::Product(product) = step else { continue };
            for weight in &product.weights {
                flops += 2.0 * weight.elem_count() as f64;
                bytes += (weight.elem_count() * weight.dtype().size_in_bytes()) as f64;
            }
        }
        Ok(Recording { steps: kernels.record(steps)?, flops, bytes })
    }
}

/// The steps of a token, to be asked for again and again.
pub struct Recording {
    steps: Box<dyn pmetal_metal::Recording>,
    flops: f64,
    /// Of the weights.
    bytes: f64,
}

impl Recording {
    /// Asks for them behind what was asked for before.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn replay(&self) -> Result<()> {
        let _span = profile::span(OP);
        profile::work(|| self.flops);
        profile::traffic(|| self.bytes);
        Ok(self.steps.replay()?)
    }
}
