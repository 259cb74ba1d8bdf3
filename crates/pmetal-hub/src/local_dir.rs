//! A folder of the user's own instead of the cache, with Python's notes in it: `.cache/huggingface/download/FILE.metadata` says which
//! version of a file is there.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use pmetal_core::Error as FileError;

use crate::{
    Result,
    download::{Place, Remote},
};

/// A folder that gets copies of a repository's files.
pub(crate) struct LocalDir<'a> {
    pub(crate) folder: &'a Path,
}

impl LocalDir<'_> {
    fn notes(&self, file: &str, ending: &str) -> PathBuf {
        self.folder.join(".cache/huggingface/download").join(format!("{file}.{ending}"))
    }

    /// Commit and ETag of the file that is there.
    fn version(&self, file: &str) -> Option<(String, String)> {
        let text = fs::read_to_string(self.notes(file, "metadata")).ok()?;
        let mut lines = text.lines();
        let version = (lines.next()?.to_owned(), lines.next()?.to_owned());
        self.folder.join(file).is_file().then_some(version)
    }

    /// Whether the file of this commit is there.
    pub(crate) fn has_commit(&self, file: &str, commit: &str) -> bool {
        self.version(file).is_some_and(|(known, _)| known == commit)
    }

    /// Whether the file is there in this version.
    pub(crate) fn has(&self, remote: &Remote) -> bool {
        let size = fs::metadata(self.folder.join(&remote.name)).map(|data| data.len()).ok();
        let same_etag = self.version(&remote.name).is_some_and(|(_, etag)| etag == remote.etag);
        same_etag && (remote.size.is_none() || remote.size == size)
    }

    pub(crate) fn place(&self, remote: &Remote) -> Place {
        Place {
            incomplete: self.notes(&remote.name, &format!("{}.incomplete", remote.etag)),
            path: self.folder.join(&remote.name),
            lock: self.notes(&remote.name, "lock"),
            replace: true,
        }
    }

    /// Notes which version is there.
    pub(crate) fn note(&self, remote: &Remote, commit: &str) -> Result<()> {
        let path = self.notes(&remote.name, "metadata");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let text = format!("{commit}\n{}\n{now}\n", remote.etag);
        Ok(fs::write(&path, text).map_err(FileError::io("write", &path))?)
    }
}
