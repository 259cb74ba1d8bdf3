use std::path::PathBuf;

/// What stops a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Loss or gradient was not finite several steps in a row.
    #[error(
        "loss or gradient was not finite {steps} steps in a row, the last at step {step}: lower the learning rate, or train in bf16 or f32"
    )]
    Diverged {
        /// The last such step, counted from 1.
        step: usize,
        /// How many in a row.
        steps: usize,
    },
    /// There is nothing to make a step from.
    #[error("no step to take: {reason}")]
    NoSteps {
        /// Why.
        reason: String,
    },
    /// Options that do not go together or are outside their range.
    #[error("{option}: {reason}")]
    Option {
        /// The flag.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The output is to be a folder.
    #[error("--output {} is a file: name a folder, or remove the file", path.display())]
    OutputIsFile {
        /// What was given.
        path: PathBuf,
    },
    /// What was written does not read back as it was.
    #[error("{} does not read back as it was trained: {reason}", path.display())]
    ReadBack {
        /// The file or folder.
        path: PathBuf,
        /// The difference.
        reason: String,
    },
    /// The model could not be read, run or written.
    #[error(transparent)]
    Model(#[from] pmetal_models::Error),
    /// The adapter could not be read, attached or written.
    #[error(transparent)]
    Lora(#[from] pmetal_lora::Error),
    /// The rows could not be read or tokenized.
    #[error(transparent)]
    Data(#[from] pmetal_data::Error),
    /// An id of the hub did not become a folder.
    #[error(transparent)]
    Hub(#[from] pmetal_hub::Error),
    /// An operation failed.
    #[error(transparent)]
    Ops(#[from] pmetal_ops::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] pmetal_core::Error),
    /// The tensor library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the device's memory was full.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Ops(error) => error.is_out_of_memory(),
            Self::Model(error) => error.is_out_of_memory(),
            Self::Lora(error) => error.is_out_of_memory(),
            Self::Candle(error) => pmetal_ops::device::is_out_of_memory(error),
            _ => false,
        }
    }
}
