use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// What goes wrong outside models and numbers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read, written, created or renamed.
    #[error("cannot {action} {}: {source}{}", path.display(), next_step(source))]
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

/// What to do about what the system says, to be put behind it; nothing where it is not one of the usual things.
pub fn next_step(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "; check the path",
        ErrorKind::PermissionDenied => "; change its permissions, or choose another",
        ErrorKind::NotADirectory => "; part of the path is a file: choose another",
        ErrorKind::IsADirectory => "; it is a folder: name a file",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room and try again",
        ErrorKind::ReadOnlyFilesystem => "; choose another place",
        ErrorKind::InvalidFilename => "; choose a shorter name",
        _ => "",
    }
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
