//! A repository at one revision becomes a folder.

use std::path::PathBuf;

use serde_json::Value;

use crate::{
    Choice, DownloadProgress, Error, Kind, Patience, RepoId, Result,
    cache::{Cached, RepoCache, is_commit},
    client::{Client, Failure, Request},
    download::{Place, ask, fetch},
    local_dir::LocalDir,
    refusal::About,
    select::is_plain,
    url::{encode_part, encode_path},
};

/// The hub leaves files out of the short list of a repository with more than this.
const SHORT_LIST: usize = 50_000;

/// What is to be downloaded.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Model or dataset.
    pub kind: Kind,
    /// Which; the file in it is a [`Choice::File`].
    pub repo: RepoId,
    /// Which of its files.
    pub choice: Choice,
    /// A folder to put them in, instead of the cache.
    pub local_dir: Option<PathBuf>,
}

impl Wanted {
    /// What a run needs of a repository, or the file that its id names, in the cache.
    pub fn new(kind: Kind, repo: RepoId) -> Self {
        let choice = repo.file.clone().map_or(Choice::Needed, Choice::File);
        Self { kind, repo, choice, local_dir: None }
    }
}

/// A repository at a commit.
struct Listing {
    commit: String,
    files: Vec<String>,
}

/// Downloads what is missing and returns the folder, or the file where one was chosen.
pub(crate) fn download(client: &Client, wanted: &Wanted, progress: &dyn DownloadProgress) -> Result<PathBuf> {
    let about = About { settings: &client.settings, kind: wanted.kind, repo: &wanted.repo, file: None };
    let cache = RepoCache::new(&client.settings.cache, wanted.kind, &wanted.repo);
    let revision = wanted.repo.revision();
    if !is_plain(revision) {
        return Err(about.no_revision());
    }
    let found = match wanted.local_dir {
        Some(_) => Ok(Cached::Nothing),
        None => cache.look(revision, &wanted.choice),
    };
    if client.settings.offline {
        let offline = || Error::Offline { what: about.what(), cache: client.settings.cache.clone() };
        let (commit, files) = found?.or_refuse(&about, "HF_HUB_OFFLINE is set".into(), progress, offline)?;
        return Ok(result(wanted, cache.snapshot(&commit), &files));
    }
    // what did not fit what the cache knows may fit what the hub has now
    let found = found.unwrap_or(Cached::Nothing);
    if let (true, Cached::Whole { commit, files, listed: true }) = (is_commit(revision), &found) {
        return Ok(result(wanted, cache.snapshot(commit), files));
    }
    let mut patience = client.settings.patience;
    if matches!(found, Cached::Whole { .. }) {
        patience.failures = 1;
    }
    let failure = match resolve(client, wanted, &cache, patience, progress) {
        Ok(listing) => return complete(client, wanted, &cache, &listing, progress),
        Err(failure) => failure,
    };
    let Some(reason) = away(&failure) else { return Err(about.error(failure)) };
    let reason = format!("cannot reach {}: {reason}", client.settings.endpoint);
    let nothing = || match failure {
        Failure::NoConnection { .. } | Failure::Dropped { .. } => {
            Error::NotCached { what: about.what(), reason: reason.clone() }
        }
        other => about.error(other),
    };
    let (commit, files) = found.or_refuse(&about, reason.clone(), progress, nothing)?;
    progress.note(&format!("{reason}; using the cached snapshot of {}", about.what()));
    Ok(result(wanted, cache.snapshot(&commit), &files))
}

fn result(wanted: &Wanted, folder: PathBuf, files: &[String]) -> PathBuf {
    match (&wanted.choice, files) {
        (Choice::File(_), [file]) => folder.join(file),
        _ => folder,
    }
}

/// Why there was no answer that counts; `None` where the hub itself refuses.
fn away(failure: &Failure) -> Option<String> {
    match failure {
        Failure::NoConnection { reason, .. } | Failure::Dropped { reason, .. } => Some(reason.clone()),
        Failure::Status(refusal) if refusal.status == 429 || refusal.status >= 500 => {
            Some(format!("it answers {}", refusal.status))
        }
        Failure::Refused(Error::Protocol { reason, .. }) => Some(reason.clone()),
        Failure::Status(_) | Failure::Stopped | Failure::Refused(_) => None,
    }
}

/// What the revision stands for now, and which files the repository has there.
fn resolve(
    client: &Client,
    wanted: &Wanted,
    cache: &RepoCache,
    patience: Patience,
    progress: &dyn DownloadProgress,
) -> Result<Listing, Failure> {
    let revision = wanted.repo.revision();
    if let (true, Some(files)) = (is_commit(revision), cache.files(revision)) {
        return Ok(Listing { commit: revision.to_owned(), files });
    }
    let (endpoint, kind, id) = (&client.settings.endpoint, wanted.kind.plural(), &wanted.repo.id);
    let url = format!("{endpoint}/api/{kind}/{id}/revision/{}", encode_part(revision));
    let info = client.json(&Request::new("GET", url.clone()), patience, progress)?;
    let commit = info.get("sha").and_then(Value::as_str).filter(|sha| is_plain(sha) && !sha.contains('/'));
    let Some(commit) = commit.map(str::to_owned) else {
        return Err(Error::Protocol { url, reason: "the answer names no commit".into() }.into());
    };
    let siblings = info.get("siblings").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let name = |sibling: &Value| Some(sibling.get("rfilename")?.as_str()?.to_owned());
    let mut files: Vec<String> = siblings.iter().filter_map(name).collect();
    if files.is_empty() || files.len() >= SHORT_LIST {
        let tree = format!("{endpoint}/api/{kind}/{id}/tree/{}?recursive=true", encode_part(&commit));
        files = whole_tree(client, tree, patience, progress)?;
    }
    Ok(Listing { commit, files })
}

/// The files of a repository, page by page.
fn whole_tree(
    client: &Client,
    first: String,
    patience: Patience,
    progress: &dyn DownloadProgress,
) -> Result<Vec<String>, Failure> {
    let mut files = Vec::new();
    let mut next = Some(first);
    while let Some(url) = next.take() {
        let (page, link) = client.json_and_link(&Request::new("GET", url), patience, progress)?;
        let entries = page.as_array().map(Vec::as_slice).unwrap_or_default();
        let is_file = |entry: &&Value| entry.get("type").and_then(Value::as_str) == Some("file");
        let path = |entry: &Value| Some(entry.get("path")?.as_str()?.to_owned());
        files.extend(entries.iter().filter(is_file).filter_map(path));
        next = link;
    }
    Ok(files)
}

/// Downloads the chosen files that are missing.
fn complete(
    client: &Client,
    wanted: &Wanted,
    cache: &RepoCache,
    listing: &Listing,
    progress: &dyn DownloadProgress,
) -> Result<PathBuf> {
    let Listing { commit, files } = listing;
    let chosen = wanted.choice.among(wanted.kind, &wanted.repo.id, files)?;
    for &file in &chosen {
        let about = About { settings: &client.settings, kind: wanted.kind, repo: &wanted.repo, file: Some(file) };
        let done = match &wanted.local_dir {
            Some(folder) => into_folder(client, wanted, &LocalDir { folder }, commit, file, progress),
            None => into_cache(client, wanted, cache, commit, file, progress),
        };
        done.map_err(|failure| about.error(failure))?;
    }
    let owned: Vec<String> = chosen.into_iter().map(str::to_owned).collect();
    if let Some(folder) = &wanted.local_dir {
        return Ok(result(wanted, folder.clone(), &owned));
    }
    cache.set_files(commit, files)?;
    // last: until then the revision stands for what is whole
    cache.set_ref(wanted.repo.revision(), commit)?;
    Ok(result(wanted, cache.snapshot(commit), &owned))
}

fn into_cache(
    client: &Client,
    wanted: &Wanted,
    cache: &RepoCache,
    commit: &str,
    file: &str,
    progress: &dyn DownloadProgress,
) -> Result<(), Failure> {
    if cache.snapshot(commit).join(file).exists() {
        return Ok(());
    }
    let remote = ask(client, file, file_url(client, wanted, commit, file), progress)?;
    let path = cache.blob(&remote.etag);
    let incomplete = path.with_file_name(format!("{}.incomplete", remote.etag));
    let place = Place { incomplete, path, lock: cache.lock(&remote.etag), replace: false };
    fetch(client, &remote, &place, progress)?;
    Ok(cache.link(commit, file, &remote.etag)?)
}

fn into_folder(
    client: &Client,
    wanted: &Wanted,
    folder: &LocalDir,
    commit: &str,
    file: &str,
    progress: &dyn DownloadProgress,
) -> Result<(), Failure> {
    if folder.has_commit(file, commit) {
        return Ok(());
    }
    let remote = ask(client, file, file_url(client, wanted, commit, file), progress)?;
    if !folder.has(&remote) {
        fetch(client, &remote, &folder.place(&remote), progress)?;
    }
    Ok(folder.note(&remote, commit)?)
}

fn file_url(client: &Client, wanted: &Wanted, commit: &str, file: &str) -> String {
    let (endpoint, prefix, id) = (&client.settings.endpoint, wanted.kind.prefix(), &wanted.repo.id);
    format!("{endpoint}/{prefix}{id}/resolve/{}/{}", encode_part(commit), encode_path(file))
}
