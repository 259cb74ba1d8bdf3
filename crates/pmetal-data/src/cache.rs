//! Where tokenized rows are kept, and under which name.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use pmetal_core::cache_folder;
use tempfile::TempDir;

use crate::{
    error::{Error, Result},
    reader::ending,
    store::Store,
};

/// The folder under [`CacheChoice::default`], in the program's cache folder.
const FOLDER: &str = "datasets";
/// Changes whenever rows become other ids or labels than before, or the store is laid out in another way.
const FORMAT: &str = "rows 1";

/// Where tokenized rows go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CacheChoice {
    /// `$PMETAL_CACHE/datasets`, else `pmetal/datasets` in the user's cache folder: what was tokenized once is found again.
    #[default]
    User,
    /// A folder.
    Folder(PathBuf),
    /// A temporary folder that goes with the rows.
    Temporary,
}

impl CacheChoice {
    /// The folder of all stores; none for a temporary one.
    fn folder(&self) -> Option<PathBuf> {
        match self {
            Self::Folder(folder) => Some(folder.clone()),
            Self::Temporary => None,
            Self::User => cache_folder(FOLDER),
        }
    }

    /// A store that is there already.
    pub(crate) fn find(&self, key: &str) -> Option<Store> {
        Store::open(&self.folder()?.join(key))
    }

    /// Room for a new store.
    pub(crate) fn start(&self) -> Result<TempDir> {
        let Some(folder) = self.folder() else {
            return tempfile::tempdir().map_err(|source| Error::Write { path: env::temp_dir(), source });
        };
        let made =
            fs::create_dir_all(&folder).and_then(|()| tempfile::Builder::new().prefix(".new-").tempdir_in(&folder));
        made.map_err(|source| Error::Cache { path: folder, source })
    }

    /// Gives a finished store its name, and opens it.
    pub(crate) fn keep(&self, staged: TempDir, key: &str) -> Result<(Store, Option<Arc<TempDir>>)> {
        let unreadable = |path: &Path| Error::Write {
            path: path.to_path_buf(),
            source: std::io::Error::other("what was written does not read back"),
        };
        let Some(folder) = self.folder() else {
            let store = Store::open(staged.path()).ok_or_else(|| unreadable(staged.path()))?;
            return Ok((store, Some(Arc::new(staged))));
        };
        let place = folder.join(key);
        let staged = staged.keep();
        if fs::rename(&staged, &place).is_err() {
            // another run was faster, or left half of one: the whole one stays
            if let Some(store) = Store::open(&place) {
                let _ = fs::remove_dir_all(&staged);
                return Ok((store, None));
            }
            let replaced = fs::remove_dir_all(&place).and_then(|()| fs::rename(&staged, &place));
            replaced.map_err(|source| Error::Write { path: place.clone(), source })?;
        }
        let store = Store::open(&place).ok_or_else(|| unreadable(&place))?;
        Ok((store, None))
    }
}

/// The name of what becomes of a file under settings that `settings` tells: a hash of both.
pub(crate) fn key(file: &Path, settings: &blake3::Hasher) -> Result<String> {
    let mut hasher = settings.clone();
    let failed = |source| Error::Read { path: file.to_path_buf(), source };
    hasher.update(FORMAT.as_bytes());
    // a table is known by its ending alone
    hasher.update(ending(file).as_bytes());
    hasher.update_reader(File::open(file).map_err(failed)?).map_err(failed)?;
    Ok(hasher.finalize().to_hex().chars().take(32).collect())
}
