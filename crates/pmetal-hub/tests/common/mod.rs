//! What the tests of this crate share.

#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use pmetal_hub::{DownloadProgress, Hub, Kind, Patience, RepoId, Settings, Wanted};
use tempfile::TempDir;

use crate::server::Server;

/// Settings for a server and a cache of the test's own, with little patience.
pub fn settings(server: &Server, space: &TempDir) -> Settings {
    let patience =
        Patience { first_wait: Duration::from_millis(5), longest_wait: Duration::from_secs(5), ..Patience::default() };
    Settings { endpoint: server.url.clone(), cache: space.path().join("hub"), token: None, offline: false, patience }
}

pub fn hub(server: &Server, space: &TempDir) -> Hub {
    Hub::new(settings(server, space))
}

pub fn hub_with(server: &Server, space: &TempDir, change: impl FnOnce(&mut Settings)) -> Hub {
    let mut settings = settings(server, space);
    change(&mut settings);
    Hub::new(settings)
}

/// What a run needs of a model.
pub fn wanted(id: &str) -> Wanted {
    Wanted::new(Kind::Model, RepoId::parse(id).unwrap())
}

pub fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

/// Paths below a folder, sorted.
pub fn files_below(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    names.sort();
    names
}

/// A start of a file: its size and how much was there.
type Start = (Option<u64>, u64);

/// Writes down what it is told.
#[derive(Default)]
pub struct Log {
    notes: RefCell<Vec<String>>,
    starts: RefCell<Vec<(String, Start)>>,
    bytes: RefCell<Vec<(String, u64)>>,
}

impl Log {
    pub fn notes(&self) -> Vec<String> {
        self.notes.borrow().clone()
    }

    pub fn starts(&self, file: &str) -> Vec<Start> {
        self.starts.borrow().iter().filter(|(name, _)| name == file).map(|(_, start)| *start).collect()
    }

    /// Bytes that came of a file.
    pub fn bytes(&self, file: &str) -> u64 {
        self.bytes.borrow().iter().filter(|(name, _)| name == file).map(|(_, bytes)| bytes).sum()
    }
}

impl DownloadProgress for Log {
    fn start(&self, file: &str, total: Option<u64>, already: u64) {
        self.starts.borrow_mut().push((file.to_owned(), (total, already)));
    }

    fn advance(&self, file: &str, bytes: u64) {
        self.bytes.borrow_mut().push((file.to_owned(), bytes));
    }

    fn note(&self, line: &str) {
        self.notes.borrow_mut().push(line.to_owned());
    }
}
