use std::path::{Path, PathBuf};

use crate::{DownloadProgress, Error, Hub, Kind, RepoId, Result, Wanted};

/// The path itself where something is there under that name, else the snapshot of the hub's repository of that id, downloaded where it is
/// not cached. For `org/name:file.gguf` the file.
///
/// # Errors
/// Where nothing is there and the name is no id, where a path comes with a revision, and as [`Hub::download`].
pub fn locate(kind: Kind, name: &Path, revision: Option<&str>, progress: &dyn DownloadProgress) -> Result<PathBuf> {
    if name.exists() {
        return match revision {
            None => Ok(name.to_path_buf()),
            Some(revision) => Err(Error::RevisionOfPath { path: name.to_path_buf(), revision: revision.to_owned() }),
        };
    }
    let Some(text) = name.to_str().filter(|text| RepoId::parse(text).is_some()) else {
        return Err(Error::NoSuchPath { name: name.display().to_string() });
    };
    let repo = RepoId::with_revision(text, revision)?;
    Hub::from_env()?.download(&Wanted::new(kind, repo), progress)
}
