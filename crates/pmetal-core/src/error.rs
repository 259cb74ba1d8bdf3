use std::path::{Path, PathBuf};

/// What goes wrong outside models and numbers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read, written, created or renamed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `write`, `create`, `rename`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// A name that is none of those a flag takes.
    #[error("unknown {what} '{got}', expected one of {expected}")]
    UnknownName {
        /// What is named: `dtype`, `device`.
        what: &'static str,
        /// What was given.
        got: String,
        /// The names it takes.
        expected: &'static str,
    },
}

impl Error {
    /// An [`Error::Io`] for use in `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
