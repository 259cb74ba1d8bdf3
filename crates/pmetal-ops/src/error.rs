/// What an operation refuses.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operand has the wrong shape, dtype or layout.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Operand {
        /// The operation.
        op: &'static str,
        /// The operand.
        what: String,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A row attends to more keys than the cache holds, or lengths do not add up.
    #[error("{op}: {reason}")]
    Lengths {
        /// The operation.
        op: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// A parameter is asked for that the arena does not have.
    #[error("no trainable parameter is called {0}")]
    NoSuchParam(String),
    /// A file could not be mapped into memory.
    #[error("cannot map {}: {source}", path.display())]
    Map {
        /// The file.
        path: std::path::PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// The GPU refused, or failed.
    #[error(transparent)]
    Gpu(#[from] pmetal_metal::Error),
    /// The tensor library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Operand`] from anything that prints itself.
    pub(crate) fn operand(
        op: &'static str,
        what: impl Into<String>,
        expected: impl std::fmt::Debug,
        got: impl std::fmt::Debug,
    ) -> Self {
        Self::Operand { op, what: what.into(), expected: format!("{expected:?}"), got: format!("{got:?}") }
    }
}
