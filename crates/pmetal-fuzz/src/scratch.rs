use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

/// A folder for one run of a target.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    /// Makes it.
    ///
    /// # Panics
    /// Where the machine has no room for a temporary file: nothing can be tested there.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// Writes a file and returns its path.
    ///
    /// # Panics
    /// As [`Scratch::new`].
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).expect("room for a temporary file");
        path
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}
