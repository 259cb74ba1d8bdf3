//! Tensors that rest elsewhere: copies at once, and the order in which a device's memory is asked for.

use candle_core::Tensor;
use pmetal_metal::{Resting, Result};

struct Rested {
    /// In the device's memory.
    here: Option<Tensor>,
    /// In the host's.
    there: Tensor,
}

pub(crate) fn rested(tensor: &Tensor) -> Result<Box<dyn Resting>> {
    Ok(Box::new(Rested { here: Some(tensor.clone()), there: tensor.copy()? }))
}

impl Resting for Rested {
    fn leave(&mut self) -> Result<()> {
        self.here = None;
        Ok(())
    }

    fn recall(&mut self) -> Result<()> {
        if self.here.is_none() {
            self.here = Some(self.there.copy()?);
        }
        Ok(())
    }

    fn take(mut self: Box<Self>) -> Result<Tensor> {
        self.recall()?;
        Ok(self.here.unwrap_or(self.there))
    }
}
