//! Which operations failed on this machine, kept between runs.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use pmetal_core::{StagedFile, cache_folder};
use serde::{Deserialize, Serialize};

/// What a verdict is about: another device, driver or version of the program starts anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subject {
    pub device: String,
    pub driver: String,
    pub version: String,
}

#[derive(Serialize, Deserialize)]
struct Verdict {
    #[serde(flatten)]
    subject: Subject,
    switched_off: BTreeSet<String>,
}

impl Subject {
    /// `cpu-avx2-0.1.0.json` in the folder of the doctor.
    fn file(&self, folder: &Path) -> PathBuf {
        let Self { device, driver, version } = self;
        let name = format!("{device} {driver} {version}").to_lowercase();
        let words = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '.').filter(|word| !word.is_empty());
        folder.join(words.collect::<Vec<_>>().join("-") + ".json")
    }
}

/// The folder of all verdicts.
pub(super) fn folder() -> Option<PathBuf> {
    cache_folder("doctor")
}

/// The operations that failed; none where nothing was kept, or what was kept is of another device or not to be read.
pub(super) fn read(folder: &Path, subject: &Subject) -> BTreeSet<String> {
    let text = fs::read_to_string(subject.file(folder)).unwrap_or_default();
    let kept = serde_json::from_str::<Verdict>(&text).ok().filter(|kept| kept.subject == *subject);
    kept.map(|kept| kept.switched_off).unwrap_or_default()
}

/// Keeps the operations that failed; where none did, nothing is kept.
pub(super) fn write(folder: &Path, subject: &Subject, failed: &BTreeSet<String>) -> pmetal_core::Result<()> {
    let path = subject.file(folder);
    let failure = pmetal_core::Error::io("write", &path);
    if failed.is_empty() {
        return match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failure(e)),
            _ => Ok(()),
        };
    }
    let verdict = Verdict { subject: subject.clone(), switched_off: failed.clone() };
    let staged = StagedFile::new(&path)?;
    serde_json::to_vec_pretty(&verdict)
        .map_err(io::Error::from)
        .and_then(|text| fs::write(staged.path(), text))
        .map_err(failure)?;
    staged.commit()
}
