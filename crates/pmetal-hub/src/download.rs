//! One file: asked about, loaded in as many pieces as it takes, checked, put in its place.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use pmetal_core::Error as FileError;
use sha2::{Digest, Sha256};

use crate::{
    DownloadProgress, Error, Result,
    client::{Answer, Client, Failure, Request},
    retry::{Tries, pause},
};

const BUFFER: usize = 256 << 10;
/// How often a lock that another process holds is tried.
const LOCK_WAIT: Duration = Duration::from_millis(200);

/// A file on the hub.
pub(crate) struct Remote {
    /// Its path in the repository.
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) etag: String,
    /// Its size, where the hub says it.
    pub(crate) size: Option<u64>,
}

impl Remote {
    /// Whether the ETag is the sha256 of the file, as it is for large files.
    fn is_checked(&self) -> bool {
        self.etag.len() == 64 && self.etag.bytes().all(|b| b.is_ascii_hexdigit())
    }
}

/// Where a file goes.
pub(crate) struct Place {
    /// While it is loaded.
    pub(crate) incomplete: PathBuf,
    /// When it is whole.
    pub(crate) path: PathBuf,
    /// Held meanwhile.
    pub(crate) lock: PathBuf,
    /// What is there under that name is another version.
    pub(crate) replace: bool,
}

impl Place {
    fn is_filled(&self) -> bool {
        !self.replace && self.path.exists()
    }
}

/// Asks the hub for ETag and size of a file.
pub(crate) fn ask(
    client: &Client,
    name: &str,
    url: String,
    progress: &dyn DownloadProgress,
) -> Result<Remote, Failure> {
    let request = Request::new("HEAD", url.clone());
    let mut tries = Tries::new(client.settings.patience, progress);
    let answer = loop {
        match client.send_once(&request, true, progress) {
            Ok(answer) => break answer,
            Err(failure) => tries.after(failure)?,
        }
    };
    let etag = etag_of(&answer).ok_or_else(|| {
        let reason = "the answer for a file has no usable ETag".into();
        Failure::Refused(Error::Protocol { url: url.clone(), reason })
    })?;
    let own_length = if answer.status() < 300 { answer.header("content-length") } else { None };
    let size = answer.header("x-linked-size").or(own_length).and_then(|text| text.trim().parse().ok());
    Ok(Remote { name: name.to_owned(), url, etag, size })
}

/// The ETag as a file name: without quotes and the mark of a weak one.
fn etag_of(answer: &Answer) -> Option<String> {
    let raw = answer.header("x-linked-etag").or_else(|| answer.header("etag"))?;
    let etag = raw.trim().trim_start_matches("W/").trim_matches('"').to_owned();
    let safe = etag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b)) && !etag.starts_with('.');
    (safe && !etag.is_empty()).then_some(etag)
}

/// Loads a file into its place, unless it is there already. Other processes that want it wait.
pub(crate) fn fetch(
    client: &Client,
    remote: &Remote,
    place: &Place,
    progress: &dyn DownloadProgress,
) -> Result<(), Failure> {
    for path in [&place.incomplete, &place.path, &place.lock] {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(FileError::io("create", folder)).map_err(Error::from)?;
        }
    }
    let lock = File::options().create(true).truncate(false).write(true).open(&place.lock);
    let lock = lock.map_err(FileError::io("write", &place.lock)).map_err(Error::from)?;
    let locked = hold(&lock, place, remote, progress)?;
    if place.is_filled() {
        return Ok(());
    }
    // where a file system has no locks, no two processes may share a file
    let incomplete = if locked { place.incomplete.clone() } else { with_process_id(&place.incomplete) };
    let loaded = load(client, remote, &incomplete, progress);
    if !locked && loaded.is_err() {
        let _ = fs::remove_file(&incomplete);
    }
    loaded?;
    fs::rename(&incomplete, &place.path).map_err(FileError::io("write", &place.path)).map_err(Error::from)?;
    progress.finish(&remote.name);
    Ok(())
}

/// Takes the lock; false where the file system has none.
fn hold(lock: &File, place: &Place, remote: &Remote, progress: &dyn DownloadProgress) -> Result<bool> {
    let mut told = false;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) if place.is_filled() => return Ok(false),
            Err(TryLockError::WouldBlock) => {
                if !told {
                    progress.note(&format!("waiting for another process that loads {}", remote.name));
                    told = true;
                }
                pause(LOCK_WAIT, progress)?;
            }
            Err(TryLockError::Error(_)) => return Ok(false),
        }
    }
}

fn with_process_id(path: &Path) -> PathBuf {
    path.with_extension(format!("{}.incomplete", std::process::id()))
}

/// Loads a file until it is whole and what the hub says it is.
fn load(client: &Client, remote: &Remote, path: &Path, progress: &dyn DownloadProgress) -> Result<(), Failure> {
    let mut partial = Partial::open(path, remote)?;
    let resumed = partial.length > 0;
    progress.start(&remote.name, remote.size, partial.length);
    receive(client, remote, &mut partial, progress)?;
    match partial.check(remote) {
        Err(Error::Mismatch { .. }) if resumed => {
            // what an earlier run left may have been wrong already
            progress
                .note(&format!("{}: what was left of an earlier download does not fit, loading it anew", remote.name));
            partial.restart()?;
            progress.start(&remote.name, remote.size, 0);
            receive(client, remote, &mut partial, progress)?;
        }
        _ => {}
    }
    let checked = partial.check(remote).and_then(|()| partial.sync());
    if let Err(Error::Mismatch { .. }) = &checked {
        let _ = fs::remove_file(path);
    }
    Ok(checked?)
}

/// Makes requests until the whole file has come.
fn receive(
    client: &Client,
    remote: &Remote,
    partial: &mut Partial,
    progress: &dyn DownloadProgress,
) -> Result<(), Failure> {
    let mut tries = Tries::new(client.settings.patience, progress);
    let mut ranges = true;
    while partial.length == 0 || remote.size.is_none_or(|size| partial.length < size) {
        let before = partial.length;
        match piece(client, remote, partial, &mut ranges, progress) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(failure) => {
                if partial.length > before {
                    tries.reset();
                }
                let reason = match &failure {
                    Failure::NoConnection { reason, .. } | Failure::Dropped { reason, .. } => Some(reason.clone()),
                    _ => None,
                };
                let (file, failures) = (remote.name.clone(), tries.failures() + 1);
                tries.after(failure).map_err(|failure| match reason {
                    Some(reason) => Error::Transfer { file, failures, reason }.into(),
                    None => failure,
                })?;
            }
        }
    }
    Ok(())
}

/// One request for what is missing. True where the answer came to its end, false where another without a range is needed.
fn piece(
    client: &Client,
    remote: &Remote,
    partial: &mut Partial,
    ranges: &mut bool,
    progress: &dyn DownloadProgress,
) -> Result<bool, Failure> {
    if partial.length > 0 && !*ranges {
        anew(remote, partial, progress)?;
    }
    let mut request = Request::new("GET", remote.url.clone());
    if partial.length > 0 {
        request = request.header("range", format!("bytes={}-", partial.length));
    }
    let answer = match client.send_once(&request, false, progress) {
        Err(Failure::Status(refusal)) if refusal.status == 416 && partial.length > 0 => {
            *ranges = false;
            return Ok(false);
        }
        answer => answer?,
    };
    if answer.status() == 206 && !continues(&answer, remote, partial.length) {
        if partial.length == 0 {
            let reason = "it sends a range of a file that nobody asked for".into();
            return Err(Error::Protocol { url: answer.url.clone(), reason }.into());
        }
        *ranges = false;
        return Ok(false);
    }
    if answer.status() != 206 && partial.length > 0 {
        // the server does not know ranges and sends everything
        anew(remote, partial, progress)?;
    }
    let url = answer.url.clone();
    let announced = answer.header("content-length").and_then(|text| text.parse::<u64>().ok());
    let expected = remote.size.or(announced.map(|rest| rest + partial.length));
    let mut body = answer.into_reader();
    let mut buffer = vec![0; BUFFER];
    loop {
        if progress.stopped() {
            return Err(Failure::Stopped);
        }
        let read = body.read(&mut buffer).map_err(|e| Failure::Dropped { url: url.clone(), reason: e.to_string() })?;
        if read == 0 {
            break;
        }
        partial.append(buffer.get(..read).unwrap_or_default())?;
        progress.advance(&remote.name, read as u64);
    }
    match expected {
        Some(expected) if partial.length < expected => {
            let reason = format!("{} of {expected} bytes came", partial.length);
            Err(Failure::Dropped { url, reason })
        }
        _ => Ok(true),
    }
}

fn anew(remote: &Remote, partial: &mut Partial, progress: &dyn DownloadProgress) -> Result<()> {
    partial.restart()?;
    progress.start(&remote.name, remote.size, 0);
    Ok(())
}

/// Whether a partial answer goes on where the file ends, with the same version of it. The store of large files has ETags of its own; there
/// the checksum decides.
fn continues(answer: &Answer, remote: &Remote, length: u64) -> bool {
    let range = answer.header("content-range").unwrap_or_default();
    let range = range.trim().strip_prefix("bytes").unwrap_or_default().trim_start();
    let (span, total) = range.split_once('/').unwrap_or_default();
    let starts_here = span.split('-').next().and_then(|start| start.trim().parse().ok()) == Some(length);
    let total_fits = match (total.trim().parse::<u64>(), remote.size) {
        (Ok(total), Some(size)) => total == size,
        _ => true,
    };
    let same_version = remote.is_checked() || etag_of(answer).is_none_or(|etag| etag == remote.etag);
    starts_here && total_fits && same_version
}

/// A file that is being loaded, and its checksum so far.
struct Partial {
    path: PathBuf,
    file: File,
    length: u64,
    /// For files whose ETag is their sha256.
    hash: Option<Sha256>,
}

impl Partial {
    /// Opens what an earlier download left, or an empty file.
    fn open(path: &Path, remote: &Remote) -> Result<Self> {
        let opened = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let file = opened.map_err(FileError::io("write", path))?;
        let mut partial =
            Self { path: path.to_path_buf(), file, length: 0, hash: remote.is_checked().then(Sha256::new) };
        let length = partial.file.metadata().map_err(FileError::io("read", path))?.len();
        if remote.size.is_none_or(|size| length > size) {
            partial.restart()?;
        } else {
            partial.take_over(length)?;
        }
        Ok(partial)
    }

    /// Reads the `length` bytes that are there.
    fn take_over(&mut self, length: u64) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        while self.length < length {
            let read = self.file.read(&mut buffer).map_err(FileError::io("read", &self.path))?;
            if read == 0 {
                break;
            }
            self.count(buffer.get(..read).unwrap_or_default());
        }
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(FileError::io("write", &self.path))?;
        self.count(bytes);
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(FileError::io("write", &self.path))?;
        self.length = 0;
        self.hash = self.hash.take().map(|_| Sha256::new());
        Ok(())
    }

    /// Compares length and checksum with what the hub says.
    fn check(&self, remote: &Remote) -> Result<()> {
        let mismatch = |quantity, expected: String, found: String| {
            Err(Error::Mismatch { file: remote.name.clone(), quantity, expected, found })
        };
        if let Some(size) = remote.size.filter(|&size| size != self.length) {
            return mismatch("length", format!("{size} bytes"), format!("{} bytes", self.length));
        }
        let Some(hash) = &self.hash else { return Ok(()) };
        let found = hex(&hash.clone().finalize());
        if found.eq_ignore_ascii_case(&remote.etag) { Ok(()) } else { mismatch("sha256", remote.etag.clone(), found) }
    }

    fn sync(&self) -> Result<()> {
        Ok(self.file.sync_all().map_err(FileError::io("write", &self.path))?)
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
