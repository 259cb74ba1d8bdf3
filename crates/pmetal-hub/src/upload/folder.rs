//! The files of a folder that is uploaded.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use pmetal_core::Error as FileError;

use crate::{DownloadProgress, Error, Result};

/// Bytes of a file that the hub looks at to tell text from data.
const SAMPLE: u64 = 512;

/// A file of the commit.
pub(super) struct Item {
    /// Its path in the repository.
    pub(super) path: String,
    /// Bytes.
    pub(super) size: u64,
    pub(super) content: Content,
}

/// Where a file's bytes are.
pub(super) enum Content {
    Disk(PathBuf),
    Text(String),
}

impl Item {
    /// Its first bytes.
    pub(super) fn sample(&self) -> Result<Vec<u8>> {
        match &self.content {
            Content::Text(text) => Ok(text.bytes().take(SAMPLE as usize).collect()),
            Content::Disk(path) => {
                let mut sample = Vec::new();
                let read = File::open(path).and_then(|file| file.take(SAMPLE).read_to_end(&mut sample));
                read.map_err(FileError::io("read", path))?;
                Ok(sample)
            }
        }
    }

    /// All of it.
    pub(super) fn read(&self) -> Result<Vec<u8>> {
        match &self.content {
            Content::Text(text) => Ok(text.clone().into_bytes()),
            Content::Disk(path) => Ok(fs::read(path).map_err(FileError::io("read", path))?),
        }
    }
}

/// The files below a folder that holds an adapter or model, by path. Hidden files stay here, and the checkpoints of a run.
pub(super) fn items(folder: &Path, progress: &dyn DownloadProgress) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut checkpoints = 0;
    collect(folder, "", &mut items, &mut checkpoints)?;
    let is_model = |item: &Item| {
        matches!(item.path.as_str(), "adapter_config.json" | "config.json") || item.path.ends_with(".gguf")
    };
    if !items.iter().any(is_model) {
        return Err(Error::NothingToUpload { path: folder.to_path_buf() });
    }
    if checkpoints > 0 {
        progress.note(&format!("checkpoint folders are left out: {checkpoints}"));
    }
    items.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(items)
}

fn collect(folder: &Path, prefix: &str, items: &mut Vec<Item>, checkpoints: &mut usize) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(FileError::io("read", folder))? {
        let entry = entry.map_err(FileError::io("read", folder))?;
        let (place, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str() else {
            return Err(Error::Content { path: place, reason: "the hub takes names in UTF-8 only".into() });
        };
        if name.starts_with('.') {
            continue;
        }
        let data = fs::metadata(&place).map_err(FileError::io("read", &place))?;
        let path = format!("{prefix}{name}");
        if data.is_dir() && is_checkpoint(name) {
            *checkpoints += 1;
        } else if data.is_dir() {
            collect(&place, &format!("{path}/"), items, checkpoints)?;
        } else if data.is_file() {
            items.push(Item { path, size: data.len(), content: Content::Disk(place) });
        }
    }
    Ok(())
}

fn is_checkpoint(name: &str) -> bool {
    name.strip_prefix("checkpoint-").is_some_and(|step| !step.is_empty() && step.bytes().all(|b| b.is_ascii_digit()))
}
