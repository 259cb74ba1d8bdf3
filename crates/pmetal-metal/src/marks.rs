//! Points of a device's work, and the time between them.

use std::time::Instant;

use crate::Result;

/// Points that a device passes on its way through what it was asked for. They need not wait for the device until they are read.
pub trait Marks {
    /// Marks the point behind all that was asked for so far.
    fn mark(&mut self) -> Result<()>;

    /// Seconds from the first mark to each, in order. Waits until the last has been passed.
    fn seconds(&self) -> Result<Vec<f64>>;
}

/// Marks by the host's clock, for work that is done when the call that asks for it returns.
#[derive(Debug, Default)]
pub struct HostMarks(Vec<Instant>);

impl Marks for HostMarks {
    fn mark(&mut self) -> Result<()> {
        self.0.push(Instant::now());
        Ok(())
    }

    fn seconds(&self) -> Result<Vec<f64>> {
        Ok(self.0.iter().map(|mark| mark.duration_since(self.0[0]).as_secs_f64()).collect())
    }
}
