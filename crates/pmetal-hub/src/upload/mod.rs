//! A folder becomes a commit: the repository is made, the hub says which files are large, those go to its store, the commit names them all.
//! What is sent is what Python's `huggingface_hub` sends without its Xet extension.

mod card;
mod folder;
mod lfs;

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};

use crate::{
    DownloadProgress, Error, Kind, RepoId, Result,
    client::{Client, Failure, Payload, Request},
    refusal::About,
    url::encode_part,
};
use folder::{Content, Item};

/// How many files the hub takes in one question.
const BATCH: usize = 256;
const CARD: &str = "README.md";

/// What is to be uploaded, and where to.
#[derive(Clone, Debug)]
pub struct Upload<'a> {
    /// The folder of an adapter or model.
    pub folder: &'a Path,
    /// `org/name`; its revision is the branch, made where there is none.
    pub repo: RepoId,
    /// Make the repository a private one.
    pub private: bool,
    /// The commit's title.
    pub message: Option<&'a str>,
    /// Open a pull request instead of committing to the branch.
    pub create_pr: bool,
}

/// Where an upload is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// The commit's page.
    pub commit_url: String,
    /// The pull request's page.
    pub pull_request_url: Option<String>,
}

/// What the hub wants to be done with a file.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Regular,
    Lfs,
}

/// Uploads a folder.
pub(crate) fn upload(client: &Client, what: &Upload, progress: &dyn DownloadProgress) -> Result<Uploaded> {
    let mut items = folder::items(what.folder, progress)?;
    let session = Session { client, what, progress };
    let remote = session.repository()?;
    if !items.iter().any(|item| item.path == CARD) && !remote.iter().any(|file| file == CARD) {
        let text = card::model_card(what.folder, &what.repo.id, &items)?;
        items.push(Item { path: CARD.into(), size: text.len() as u64, content: Content::Text(text) });
    }
    let modes = session.modes(&items)?;
    let items: Vec<(Item, Mode)> =
        items.into_iter().zip(modes).filter_map(|(item, mode)| Some((item, mode?))).collect();
    let large: Vec<&Item> = items.iter().filter(|(_, mode)| *mode == Mode::Lfs).map(|(item, _)| item).collect();
    let checksums = lfs::upload(&session, &large)?;
    session.commit(&items, &checksums)
}

/// One upload under way.
struct Session<'a> {
    client: &'a Client,
    what: &'a Upload<'a>,
    progress: &'a dyn DownloadProgress,
}

impl Session<'_> {
    fn error(&self, failure: Failure) -> Error {
        let settings = &self.client.settings;
        About { settings, kind: Kind::Model, repo: &self.what.repo, file: None }.error(failure)
    }

    fn api(&self, rest: &str) -> String {
        format!("{}/api/models/{}{rest}", self.client.settings.endpoint, self.what.repo.id)
    }

    fn revision(&self) -> String {
        encode_part(self.what.repo.revision())
    }

    fn get(&self, url: String) -> Result<Value, Failure> {
        self.client.json(&Request::new("GET", url), self.client.settings.patience, self.progress)
    }

    fn post(&self, url: String, kind: &str, body: &[u8]) -> Result<Value, Failure> {
        let request = Request::new("POST", url).header("content-type", kind).payload(Payload::Bytes(body));
        self.client.json(&request, self.client.settings.patience, self.progress)
    }

    /// Makes the repository and the branch where they are missing, and returns the files that are there.
    fn repository(&self) -> Result<Vec<String>> {
        let (org, name) = self.what.repo.id.split_once('/').unwrap_or_default();
        let mut body = json!({ "name": name, "organization": org, "type": "model" });
        if self.what.private {
            body["visibility"] = "private".into();
        }
        let url = format!("{}/api/repos/create", self.client.settings.endpoint);
        let made = self.post(url, "application/json", body.to_string().as_bytes());
        let info = match (made, self.get(self.api(""))) {
            (Ok(_), info) => info,
            // there already; or a token that may write here and make nothing
            (Err(Failure::Status(refusal)), Ok(info)) if matches!(refusal.status, 401 | 403 | 409) => Ok(info),
            (Err(failure), _) => Err(failure),
        };
        let info = info.map_err(|failure| self.error(failure))?;
        if self.what.private && info.get("private").and_then(Value::as_bool) == Some(false) {
            return Err(Error::AlreadyPublic { id: self.what.repo.id.clone() });
        }
        let info = match self.what.repo.revision {
            Some(_) => self.branch()?,
            None => info,
        };
        let siblings = info.get("siblings").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let name = |sibling: &Value| Some(sibling.get("rfilename")?.as_str()?.to_owned());
        Ok(siblings.iter().filter_map(name).collect())
    }

    /// The branch's files; makes the branch where there is none.
    fn branch(&self) -> Result<Value> {
        let revision = self.revision();
        match self.get(self.api(&format!("/revision/{revision}"))) {
            Err(Failure::Status(refusal)) if refusal.status == 404 && !self.what.create_pr => {
                let url = self.api(&format!("/branch/{revision}"));
                let request = Request::new("POST", url).header("content-type", "application/json");
                let made = self.client.send(&request.payload(Payload::Bytes(b"{}")), self.progress);
                made.map_err(|failure| self.error(failure))?;
                Ok(Value::Null)
            }
            found => found.map_err(|failure| self.error(failure)),
        }
    }

    /// What the hub wants to be done with each file; `None` for those it ignores.
    fn modes(&self, items: &[Item]) -> Result<Vec<Option<Mode>>> {
        let mut modes = Vec::with_capacity(items.len());
        for batch in items.chunks(BATCH) {
            let files: Result<Vec<Value>> = batch
                .iter()
                .map(|item| {
                    Ok(json!({ "path": item.path, "sample": BASE64.encode(item.sample()?), "size": item.size }))
                })
                .collect();
            let body = json!({ "files": files? }).to_string();
            let pr = if self.what.create_pr { "?create_pr=1" } else { "" };
            let url = self.api(&format!("/preupload/{}{pr}", self.revision()));
            let answer = self.post(url.clone(), "application/json", body.as_bytes());
            let answer = answer.map_err(|failure| self.error(failure))?;
            let known = answer.get("files").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            for item in batch {
                let of_item = known.iter().find(|file| file.get("path").and_then(Value::as_str) == Some(&item.path));
                modes.push(self.mode(&url, item, of_item)?);
            }
        }
        Ok(modes)
    }

    fn mode(&self, url: &str, item: &Item, answer: Option<&Value>) -> Result<Option<Mode>> {
        let field = |name: &str| answer.and_then(|answer| answer.get(name));
        if field("shouldIgnore").and_then(Value::as_bool) == Some(true) {
            self.progress.note(&format!("{}: left out, the repository's .gitignore names it", item.path));
            return Ok(None);
        }
        match field("uploadMode").and_then(Value::as_str) {
            // the store takes no empty files
            Some("lfs") if item.size > 0 => Ok(Some(Mode::Lfs)),
            Some("lfs" | "regular") => Ok(Some(Mode::Regular)),
            _ => {
                let reason = format!("it does not say how to upload {}", item.path);
                Err(Error::Protocol { url: url.to_owned(), reason })
            }
        }
    }

    /// Makes the commit. `checksums` are the sha256 of the large files, in their order.
    fn commit(&self, items: &[(Item, Mode)], checksums: &[String]) -> Result<Uploaded> {
        let summary = self.what.message.unwrap_or("Upload with pmetal");
        let mut lines = vec![json!({ "key": "header", "value": { "summary": summary, "description": "" } })];
        let mut checksums = checksums.iter();
        for (item, mode) in items {
            lines.push(match (mode, checksums.as_slice().first()) {
                (Mode::Lfs, Some(oid)) => {
                    checksums.next();
                    let value = json!({ "path": item.path, "algo": "sha256", "oid": oid, "size": item.size });
                    json!({ "key": "lfsFile", "value": value })
                }
                _ => {
                    let content = BASE64.encode(item.read()?);
                    let value = json!({ "content": content, "path": item.path, "encoding": "base64" });
                    json!({ "key": "file", "value": value })
                }
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let pr = if self.what.create_pr { "?create_pr=1" } else { "" };
        let url = self.api(&format!("/commit/{}{pr}", self.revision()));
        let request = Request::new("POST", url.clone()).header("content-type", "application/x-ndjson");
        // sent once: a commit whose answer is lost may have been made
        let request = request.payload(Payload::Bytes(body.as_bytes()));
        let answer = self.client.send_once(&request, false, self.progress).and_then(|answer| answer.json());
        let answer = answer.map_err(|failure| self.error(failure))?;
        let text = |name: &str| answer.get(name).and_then(Value::as_str).map(str::to_owned);
        let Some(commit_url) = text("commitUrl") else {
            return Err(Error::Protocol { url, reason: "the answer names no commit".into() });
        };
        Ok(Uploaded { commit_url, pull_request_url: text("pullRequestUrl") })
    }
}
