use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::{Error, Result};

/// A folder that is filled beside its final place. A new one takes its place in one step; where the folder is there already, its files are
/// replaced one by one, each in one step. A reader meets no half-written file.
///
/// Dropped without [`StagedDir::commit`], it leaves nothing behind.
pub struct StagedDir {
    staged: TempDir,
    target: PathBuf,
}

impl StagedDir {
    /// Starts a folder that will become `target`. Fails where the folder above `target` cannot be written.
    pub fn new(target: &Path) -> Result<Self> {
        let parent = writable_parent(target)?;
        let staged = staging(0o777).tempdir_in(parent).map_err(Error::io("write to", parent))?;
        Ok(Self { staged, target: target.to_path_buf() })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.staged.path()
    }

    /// Syncs every file, then moves each into the target folder, replacing files of the same name and leaving others alone.
    pub fn commit(self) -> Result<()> {
        let entries = fs::read_dir(self.staged.path()).map_err(Error::io("read", self.staged.path()))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", self.staged.path()))?;
            let path = entry.path();
            fs::File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io("sync", &path))?;
            names.push(entry.file_name());
        }
        if !self.target.exists() {
            let from = self.staged.keep();
            return fs::rename(&from, &self.target).map_err(Error::io("create", &self.target));
        }
        for name in names {
            let to = self.target.join(&name);
            fs::rename(self.staged.path().join(&name), &to).map_err(Error::io("write", &to))?;
        }
        Ok(())
    }
}

/// A file that is written beside its final place and takes it in one step. Dropped without [`StagedFile::commit`], it leaves nothing.
pub struct StagedFile {
    staged: NamedTempFile,
    target: PathBuf,
}

impl StagedFile {
    /// Starts a file that will become `target`. Fails where the folder cannot be written, and where a folder or a device has the name.
    pub fn new(target: &Path) -> Result<Self> {
        if fs::metadata(target).is_ok_and(|found| !found.is_file()) {
            // a rename would put the file in the place of the device
            let source = std::io::Error::other("it is there and no file; name another");
            return Err(Error::Io { action: "write", path: target.to_path_buf(), source });
        }
        let parent = writable_parent(target)?;
        let staged = staging(0o666).tempfile_in(parent).map_err(Error::io("write to", parent))?;
        Ok(Self { staged, target: target.to_path_buf() })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.staged.path()
    }

    /// Syncs the file and gives it its name.
    pub fn commit(self) -> Result<()> {
        let target = self.target;
        self.staged.as_file().sync_all().map_err(Error::io("sync", &target))?;
        match self.staged.persist(&target) {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::Io { action: "write", path: target, source: e.error }),
        }
    }
}

/// The folder above, made where it is missing.
fn writable_parent(path: &Path) -> Result<&Path> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    Ok(parent)
}

/// Names and permissions of what is staged: like anything a program makes, not private as temporary files are.
fn staging(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(".pmetal-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_staged_folder_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out/adapter");
        let staged = StagedDir::new(&target).unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        assert!(!target.exists());
        drop(staged);
        assert!(fs::read_dir(target.parent().unwrap()).unwrap().next().is_none());

        for contents in ["1", "2"] {
            let staged = StagedDir::new(&target).unwrap();
            fs::write(staged.path().join("a"), contents).unwrap();
            staged.commit().unwrap();
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), contents);
        }
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_where_the_folder_should_be_is_an_error_that_names_it() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        let staged = StagedFile::new(&file).unwrap();
        fs::write(staged.path(), "x").unwrap();
        assert!(!file.exists());
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
        let message = StagedFile::new(root.path()).err().unwrap().to_string();
        assert!(message.contains("it is there and no file"), "{message}");
        let message = StagedFile::new(&file.join("below")).err().unwrap().to_string();
        assert!(message.contains("file"), "{message}");
    }
}
