//! Tensors that rest in the host's memory while the device has no use for them.

use candle_core::Tensor;

use crate::Result;

/// A tensor on its way to the host's memory, at rest there, or on its way back. The host waits for none of it: the device's own queue waits for
/// the copies where it must.
pub trait Resting: Send {
    /// Gives the tensor's memory back to the device once the copy to the host is done: what is asked for after this comes behind the copy.
    ///
    /// # Errors
    /// Where the device fails.
    fn leave(&mut self) -> Result<()>;

    /// Starts the copy back, beside what the device is computing.
    ///
    /// # Errors
    /// Where the device fails or has no room.
    fn recall(&mut self) -> Result<()>;

    /// The tensor, contiguous, for what is asked for after this.
    ///
    /// # Errors
    /// Where the device fails or has no room.
    fn take(self: Box<Self>) -> Result<Tensor>;
}
