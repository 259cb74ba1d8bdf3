//! The cache's layout, as Python's `huggingface_hub` has it:
//! `models--org--name/{blobs/ETAG, refs/REVISION, snapshots/COMMIT/FILE -> ../../blobs/ETAG}` and `.locks/models--org--name/ETAG.lock`.
//!
//! What Python does not know lies in `models--org--name/.pmetal/COMMIT.json`: the repository's files at a commit, so that it can be told
//! whether a snapshot is whole. Python's own record of them, `trees/COMMIT.json`, is read, not written: Python refuses a snapshot offline
//! when a file that it lists is missing, and ours hold only what is needed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use pmetal_core::{Error as FileError, StagedFile};
use serde_json::{Value, json};

use crate::{Choice, DownloadProgress, Error, Kind, RepoId, Result, refusal::About, select::is_plain};

const INDEX: &str = "model.safetensors.index.json";

/// The folder of one repository in the cache.
pub(crate) struct RepoCache {
    kind: Kind,
    id: String,
    folder: PathBuf,
    locks: PathBuf,
}

/// What a cached snapshot has of what is wanted.
pub(crate) enum Cached {
    /// All of it; not `listed` where nobody noted what the repository has, and what is there fits together.
    Whole { commit: String, files: Vec<String>, listed: bool },
    /// Only a part.
    Partial { missing: Vec<String> },
    /// There is no snapshot of that revision.
    Nothing,
}

impl RepoCache {
    pub(crate) fn new(cache: &Path, kind: Kind, repo: &RepoId) -> Self {
        let name = format!("{}--{}", kind.plural(), repo.id.replace('/', "--"));
        Self { kind, id: repo.id.clone(), folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(crate) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit that a revision stood for when it was last asked for.
    fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = is_plain(revision).then(|| fs::read_to_string(self.folder.join("refs").join(revision)).ok())??;
        Some(text.trim().to_owned()).filter(|commit| is_plain(commit) && !commit.contains('/'))
    }

    /// Notes what a revision stands for.
    pub(crate) fn set_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit_of(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write(&self.folder.join("refs").join(revision), commit)
    }

    /// Notes the files of the repository at a commit.
    pub(crate) fn set_files(&self, commit: &str, files: &[String]) -> Result<()> {
        let path = self.record(commit);
        if path.exists() {
            return Ok(());
        }
        write(&path, &json!({ "files": files }).to_string())
    }

    fn record(&self, commit: &str) -> PathBuf {
        self.folder.join(".pmetal").join(format!("{commit}.json"))
    }

    /// The files of the repository at a commit, where they were noted by us or by Python.
    pub(crate) fn files(&self, commit: &str) -> Option<Vec<String>> {
        let read = |path: PathBuf| serde_json::from_slice::<Value>(&fs::read(path).ok()?).ok();
        if let Some(ours) = read(self.record(commit)) {
            let names = ours.get("files")?.as_array()?.iter();
            return names.map(|name| Some(name.as_str()?.to_owned())).collect();
        }
        let pythons = read(self.folder.join("trees").join(format!("{commit}.json")))?;
        Some(pythons.get("files")?.as_object()?.keys().cloned().collect())
    }

    /// What is there of a revision without asking anyone.
    ///
    /// # Errors
    /// Where the repository is known and `choice` does not fit it.
    pub(crate) fn look(&self, revision: &str, choice: &Choice) -> Result<Cached> {
        let Some(commit) = self.commit_of(revision) else { return Ok(Cached::Nothing) };
        let folder = self.snapshot(&commit);
        if !folder.is_dir() {
            return Ok(Cached::Nothing);
        }
        if let Some(known) = self.files(&commit) {
            let files = owned(choice.among(self.kind, &self.id, &known)?);
            let missing: Vec<String> = files.iter().filter(|file| !folder.join(file).exists()).cloned().collect();
            return Ok(if missing.is_empty() {
                Cached::Whole { commit, files, listed: true }
            } else {
                Cached::Partial { missing }
            });
        }
        // nobody noted what there should be: what the files themselves say has to do
        let mut here = Vec::new();
        list(&folder, &folder, &mut here);
        here.sort();
        if here.is_empty() {
            return Ok(Cached::Nothing);
        }
        let Ok(files) = choice.among(self.kind, &self.id, &here).map(owned) else {
            let missing = match choice {
                Choice::File(file) => file.clone(),
                _ => "files that are needed".into(),
            };
            return Ok(Cached::Partial { missing: vec![missing] });
        };
        let missing = if self.kind == Kind::Model && *choice == Choice::Needed {
            missing_of_model(&folder, &files)
        } else {
            Vec::new()
        };
        Ok(if missing.is_empty() {
            Cached::Whole { commit, files, listed: false }
        } else {
            Cached::Partial { missing }
        })
    }

    /// Puts a blob under its name into a snapshot.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let place = self.snapshot(commit).join(file);
        if place.exists() {
            return Ok(());
        }
        if let Some(folder) = place.parent() {
            fs::create_dir_all(folder).map_err(FileError::io("create", folder))?;
        }
        // a link that leads nowhere is in the way
        if place.is_symlink() {
            fs::remove_file(&place).map_err(FileError::io("replace", &place))?;
        }
        let up = "../".repeat(file.split('/').count() + 1);
        let linked = symlink(Path::new(&format!("{up}blobs/{etag}")), &place);
        if linked.is_err() && !place.exists() {
            // a file system without links holds the file itself, as Python does it
            let blob = self.blob(etag);
            fs::rename(&blob, &place).map_err(FileError::io("write", &place))?;
        }
        Ok(())
    }
}

#[cfg(unix)]
fn symlink(target: &Path, place: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, place)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// The files that a model's own files say are missing.
fn missing_of_model(folder: &Path, files: &[String]) -> Vec<String> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let gguf = files.iter().any(|file| file.ends_with(".gguf"));
    let mut missing = BTreeSet::new();
    if !gguf && !has("config.json") && !has("adapter_config.json") {
        missing.insert("config.json".to_owned());
    }
    if !gguf && !files.iter().any(|file| file.ends_with(".safetensors")) {
        missing.insert("its safetensors".to_owned());
    }
    let index = fs::read(folder.join(INDEX)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    let shards = index.as_ref().and_then(|index| index.get("weight_map")?.as_object());
    let shards = shards.into_iter().flat_map(|map| map.values()).filter_map(Value::as_str);
    missing.extend(shards.filter(|shard| !has(shard)).map(str::to_owned));
    missing.into_iter().collect()
}

fn owned(names: Vec<&str>) -> Vec<String> {
    names.into_iter().map(str::to_owned).collect()
}

/// Paths of the files below a folder, links that lead nowhere left out.
fn list(root: &Path, folder: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            list(root, &path, into);
        } else if path.exists() {
            let inside = path.strip_prefix(root).ok().and_then(|inside| inside.to_str());
            into.extend(inside.map(|inside| inside.replace('\\', "/")));
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    let staged = StagedFile::new(path)?;
    fs::write(staged.path(), text).map_err(FileError::io("write", path))?;
    Ok(staged.commit()?)
}

/// Whether a revision is a commit: the same for ever.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl Cached {
    /// What is whole, or the error for a snapshot that cannot be completed because of `reason`; `none` for one that is not there.
    pub(crate) fn or_refuse(
        self,
        about: &About,
        reason: String,
        progress: &dyn DownloadProgress,
        none: impl FnOnce() -> Error,
    ) -> Result<(String, Vec<String>)> {
        match self {
            Self::Whole { commit, files, listed } => {
                if !listed && about.kind == Kind::Dataset {
                    let what = about.what();
                    progress.note(&format!(
                        "{what}: the cache does not say which files there should be, taking those it has"
                    ));
                }
                Ok((commit, files))
            }
            Self::Nothing => Err(none()),
            Self::Partial { missing } => {
                let more = if missing.len() > 1 { format!(" and {} more", missing.len() - 1) } else { String::new() };
                let missing = missing.first().map_or(String::new(), |first| format!("{first}{more}"));
                Err(Error::Incomplete { what: about.what(), missing, reason })
            }
        }
    }
}
