/// What a GPU refuses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kernel got a buffer that does not fit its signature.
    #[error("kernel {kernel}: {buffer} is {got}, expected {expected}")]
    Buffer {
        /// The kernel.
        kernel: &'static str,
        /// The argument.
        buffer: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The device's memory is full.
    #[error("the GPU is out of memory: {live} bytes are in use, {asked} more were asked for")]
    OutOfMemory {
        /// Bytes in use.
        live: u64,
        /// Bytes asked for.
        asked: u64,
    },
    /// The device or its driver failed.
    #[error("{device}: {reason}")]
    Device {
        /// The device.
        device: String,
        /// Its words.
        reason: String,
    },
    /// This build has no code for such a device.
    #[error("{device} is not in this build: {hint}")]
    NotBuilt {
        /// The device.
        device: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// The tensor library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
