//! From what a user names to the files with its rows.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Result},
    reader::{ENDINGS, ending},
};

/// What a part of a dataset is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Split {
    /// To train on.
    Train,
    /// To evaluate on.
    Valid,
    /// To test with.
    Test,
}

impl Split {
    const ALL: [Self; 3] = [Self::Train, Self::Valid, Self::Test];

    /// The words that file and folder names begin with.
    fn words(self) -> &'static [&'static str] {
        match self {
            Self::Train => &["train"],
            Self::Valid => &["valid", "validation", "val", "dev", "eval"],
            Self::Test => &["test"],
        }
    }

    /// Whether a name is one of the words, or one with something apart behind it: `train-00000-of-00002`.
    fn names(self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        let rest = |word: &&str| name.strip_prefix(*word).map(str::to_string);
        self.words().iter().filter_map(rest).any(|rest| !rest.starts_with(|c: char| c.is_alphabetic()))
    }
}

/// The files of a dataset: one file, or a folder's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// As the user named it.
    name: PathBuf,
    /// Each file and what it is for; none where the folder does not say.
    files: Vec<(PathBuf, Option<Split>)>,
}

impl Source {
    /// Finds the files of `path`: itself, or those of a folder with `train`, `valid` and `test` files (or folders) as Hugging Face
    /// datasets and mlx-lm have them.
    ///
    /// # Errors
    /// When there is nothing, or nothing that could be rows.
    pub fn find(path: &Path) -> Result<Self> {
        let failed = |source| Error::Read { path: path.to_path_buf(), source };
        let metadata = fs::metadata(path).map_err(failed)?;
        if !metadata.is_dir() {
            return Ok(Self { name: path.to_path_buf(), files: vec![(path.to_path_buf(), None)] });
        }
        let mut files = Vec::new();
        collect(path, None, 0, &mut files).map_err(failed)?;
        files.sort();
        if files.is_empty() {
            return Err(Error::NoRowsIn { path: path.to_path_buf(), endings: ENDINGS.join(", ") });
        }
        let source = Self { name: path.to_path_buf(), files };
        source.refuse_several_datasets()?;
        Ok(source)
    }

    /// As the user named it.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// The files of one part. Where no file says what it is for, all are to train on.
    ///
    /// # Errors
    /// When the folder says what its files are for, and none is for this.
    pub fn files(&self, split: Split) -> Result<Vec<PathBuf>> {
        let of = |wanted: Option<Split>| -> Vec<PathBuf> {
            self.files.iter().filter(|(_, split)| *split == wanted).map(|(file, _)| file.clone()).collect()
        };
        let named = of(Some(split));
        if !named.is_empty() {
            return Ok(named);
        }
        if self.files.iter().all(|(_, split)| split.is_none()) && (split == Split::Train || self.files.len() == 1) {
            return Ok(of(None));
        }
        Err(Error::NoSplit { path: self.name.clone(), split: split.words()[0] })
    }

    /// Whether the folder has files for this, by their names.
    pub fn has(&self, split: Split) -> bool {
        self.files.iter().any(|(_, of)| *of == Some(split))
    }

    /// Training files side by side in several folders are several datasets (or configurations of one).
    fn refuse_several_datasets(&self) -> Result<()> {
        let train = self.files.iter().filter(|(_, split)| *split == Some(Split::Train));
        let mut folders: Vec<&Path> = train.filter_map(|(file, _)| file.parent()).collect();
        folders.dedup();
        match folders.as_slice() {
            [first, second, ..] => Err(Error::SeveralDatasets {
                path: self.name.clone(),
                first: first.to_path_buf(),
                second: second.to_path_buf(),
            }),
            _ => Ok(()),
        }
    }
}

/// Folders are looked through this deep: `data/train/part.parquet`.
const DEPTH: usize = 3;

fn collect(
    folder: &Path,
    inherited: Option<Split>,
    depth: usize,
    files: &mut Vec<(PathBuf, Option<Split>)>,
) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| !name.starts_with('.')) else {
            continue;
        };
        let split = Split::ALL.into_iter().find(|split| split.names(name)).or(inherited);
        if path.is_dir() {
            if depth < DEPTH {
                collect(&path, split, depth + 1, files)?;
            }
        } else if ENDINGS.contains(&ending(&path).as_str()) && !is_description(name) {
            files.push((path, split));
        }
    }
    Ok(())
}

/// Files beside the rows that are no rows.
fn is_description(name: &str) -> bool {
    let described =
        ["dataset_info.json", "dataset_infos.json", "state.json", "config.json", "metadata.json", "license.txt"];
    let name = name.to_ascii_lowercase();
    described.contains(&name.as_str()) || name.starts_with("readme") || name == "dataset_dict.json"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        folder
    }

    fn files(source: &Source, split: Split) -> Vec<String> {
        let root = source.name();
        let name = |path: PathBuf| path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        source.files(split).map(|files| files.into_iter().map(name).collect()).unwrap_or_default()
    }

    #[test]
    fn folders_of_splits() {
        let mlx = folder(&["train.jsonl", "valid.jsonl", "test.jsonl", "README.md", "notes.txt.bak", ".hidden.jsonl"]);
        let source = Source::find(mlx.path()).unwrap();
        assert_eq!(files(&source, Split::Train), ["train.jsonl"]);
        assert_eq!(files(&source, Split::Valid), ["valid.jsonl"]);
        assert!(source.has(Split::Test));

        let hub = folder(&[
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/validation-0.parquet",
        ]);
        let source = Source::find(hub.path()).unwrap();
        assert_eq!(
            files(&source, Split::Train),
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        );
        assert_eq!(files(&source, Split::Valid), ["data/validation-0.parquet"]);
        assert!(source.files(Split::Test).unwrap_err().to_string().contains("no files of 'test'"));

        let nested = folder(&["train/a.csv.gz", "train/b.csv", "dev/c.csv"]);
        let source = Source::find(nested.path()).unwrap();
        assert_eq!(files(&source, Split::Train), ["train/a.csv.gz", "train/b.csv"]);
        assert_eq!(files(&source, Split::Valid), ["dev/c.csv"]);
    }

    #[test]
    fn folders_that_do_not_say_are_trained_on() {
        let plain = folder(&["a.jsonl", "b/trained.json", "dataset_info.json"]);
        let source = Source::find(plain.path()).unwrap();
        assert_eq!(files(&source, Split::Train), ["a.jsonl", "b/trained.json"]);
        assert!(source.files(Split::Valid).is_err());
    }

    #[test]
    fn what_cannot_be_a_dataset_is_refused() {
        let empty = folder(&["model.safetensors"]);
        assert!(Source::find(empty.path()).unwrap_err().to_string().contains("no file of rows"));
        let two = folder(&["main/train.parquet", "socratic/train.parquet"]);
        assert!(Source::find(two.path()).unwrap_err().to_string().contains("socratic"));
        assert!(Source::find(Path::new("nowhere.jsonl")).unwrap_err().to_string().contains("nowhere.jsonl"));
    }
}
