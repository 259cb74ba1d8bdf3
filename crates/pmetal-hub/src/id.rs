//! What names a repository of the hub.

use crate::{Error, Result};

/// What a repository holds. Adapters are models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A model or an adapter.
    Model,
    /// Rows.
    Dataset,
}

impl Kind {
    /// `models`, `datasets`: the word in the hub's API and in the cache.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    /// What stands before an id in the address of its page and of its files.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// `org/name`, `org/name@revision`, `org/name:file`, `org/name@revision:file`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: Option<String>,
    /// A file of it, or of a GGUF file's name the part that tells it from the others: `Q4_K_M`.
    pub file: Option<String>,
}

/// The longest id the hub gives.
const LONGEST: usize = 96;

/// Endings of files: what has one of them is a path, not an id.
const FILE_ENDINGS: [&str; 19] = [
    "safetensors",
    "gguf",
    "bin",
    "pt",
    "pth",
    "onnx",
    "json",
    "jsonl",
    "ndjson",
    "csv",
    "tsv",
    "parquet",
    "arrow",
    "txt",
    "gz",
    "zst",
    "yaml",
    "yml",
    "jinja",
];

impl RepoId {
    /// Reads an id; `None` for what looks like a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, file) = cut(text, ':')?;
        let (id, revision) = cut(rest, '@')?;
        let (org, name) = id.split_once('/')?;
        let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
        let is_file = ending.is_some_and(|ending| FILE_ENDINGS.contains(&ending.as_str()));
        if !is_name(org) || !is_name(name) || is_file || id.len() > LONGEST {
            return None;
        }
        Some(Self { id: id.to_owned(), revision: revision.map(str::to_owned), file: file.map(str::to_owned) })
    }

    /// Reads an id that has to be one, with a revision given beside it.
    ///
    /// # Errors
    /// Where it is none, or where the two name different revisions.
    pub fn with_revision(text: &str, revision: Option<&str>) -> Result<Self> {
        let mut id = Self::parse(text).ok_or_else(|| Error::NotAnId { text: text.to_owned() })?;
        if let Some(revision) = revision {
            if id.revision.as_deref().is_some_and(|named| named != revision) {
                return Err(Error::TwoRevisions { id: text.to_owned(), revision: revision.to_owned() });
            }
            id.revision = Some(revision.to_owned());
        }
        Ok(id)
    }

    /// The branch, tag or commit asked for.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// Splits at the first `mark`; `None` where nothing follows it.
fn cut(text: &str, mark: char) -> Option<(&str, Option<&str>)> {
    match text.split_once(mark) {
        Some((_, "")) => None,
        Some((before, after)) => Some((before, Some(after))),
        None => Some((text, None)),
    }
}

/// The hub's names: letters, digits, `-`, `_`, `.`, not at an end and not twice in a row where that would mean something else.
fn is_name(text: &str) -> bool {
    let known = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let ends = text.starts_with(['-', '.']) || text.ends_with(['-', '.']);
    known && !text.is_empty() && !ends && !text.contains("--") && !text.contains("..")
}

/// Whether a text has the form of an id of the hub, with or without revision and file. Says nothing about what exists.
pub fn is_repo_id(text: &str) -> bool {
    RepoId::parse(text).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        let parse = |text| {
            let RepoId { id, revision, file } = RepoId::parse(text)?;
            Some((id, revision.unwrap_or_default(), file.unwrap_or_default()))
        };
        let id = |id: &str, revision: &str, file: &str| Some((id.to_owned(), revision.to_owned(), file.to_owned()));
        assert_eq!(parse("Qwen/Qwen3-0.6B"), id("Qwen/Qwen3-0.6B", "", ""));
        assert_eq!(parse("a/b@refs/pr/1"), id("a/b", "refs/pr/1", ""));
        assert_eq!(parse("a/b-GGUF:sub/b.gguf"), id("a/b-GGUF", "", "sub/b.gguf"));
        assert_eq!(parse("a/b@v1.0:Q4_K_M"), id("a/b", "v1.0", "Q4_K_M"));
        let paths = [
            "model",
            "./a/b",
            "../a",
            "/a/b",
            "~/a",
            "a/b/c",
            "a/b/",
            "a//b",
            "data/x.jsonl",
            "m/x.GGUF",
            "a/b@",
            "a/b:",
            "a b/c",
            "",
            "/",
            "a/",
            "/b",
            "a/..",
            "-a/b",
            "a/b--c",
            "runs/model.safetensors",
            "data/x.jsonl.gz",
            "C:\\a\\b",
        ];
        for path in paths {
            assert!(!is_repo_id(path), "{path}");
        }
        assert!(!is_repo_id(&format!("a/{}", "b".repeat(96))));
    }

    #[test]
    fn one_revision_is_named_once() {
        assert_eq!(RepoId::with_revision("a/b", Some("v2")).unwrap().revision(), "v2");
        assert_eq!(RepoId::with_revision("a/b@v2", Some("v2")).unwrap().revision(), "v2");
        assert_eq!(RepoId::with_revision("a/b", None).unwrap().revision(), "main");
        let message = RepoId::with_revision("a/b@v1", Some("v2")).unwrap_err().to_string();
        assert!(message.contains("a/b@v1") && message.contains("v2"), "{message}");
    }
}
