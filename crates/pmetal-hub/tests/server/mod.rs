//! A small hub for tests: repositories in memory, the protocol over plain sockets, and faults on demand.

#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Path with the query.
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// What goes wrong with a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Nothing, this time.
    None,
    /// This answer instead of the right one.
    Answer { status: u16, headers: Vec<(String, String)>, body: String },
    /// The connection ends after so many bytes of the body.
    Drop(usize),
    /// The connection ends without an answer.
    Close,
    /// The answer ignores `Range`.
    WholeFile,
    /// The last byte of the body is another one.
    Corrupt,
    /// Nothing comes after so many bytes, and the connection stays open.
    Stall(usize),
    /// Where a range is asked for: this body of another version, with this ETag.
    OtherVersion { etag: &'static str, body: &'static str },
}

pub fn status(status: u16) -> Fault {
    Fault::Answer { status, headers: Vec::new(), body: String::new() }
}

pub fn error_code(code: u16, name: &str) -> Fault {
    Fault::Answer { status: code, headers: vec![("X-Error-Code".into(), name.into())], body: String::new() }
}

pub fn retry_after(value: &str) -> Fault {
    Fault::Answer { status: 429, headers: vec![("Retry-After".into(), value.into())], body: String::new() }
}

struct Planned {
    method: &'static str,
    part: String,
    fault: Fault,
    times: usize,
}

/// A file, large ones kept in the store.
#[derive(Clone)]
pub struct StoredFile {
    pub bytes: Arc<Vec<u8>>,
    pub lfs: bool,
}

impl StoredFile {
    fn etag(&self) -> String {
        let sha = sha256(&self.bytes);
        if self.lfs { sha } else { sha[..40].to_owned() }
    }
}

/// A repository: its commits, oldest first.
#[derive(Clone, Default)]
pub struct Repo {
    pub private: bool,
    pub commits: Vec<(String, BTreeMap<String, StoredFile>)>,
    pub branches: BTreeMap<String, String>,
}

#[derive(Default)]
pub struct State {
    /// By `models/org/name`.
    pub repos: BTreeMap<String, Repo>,
    pub requests: Vec<Request>,
    pub store: BTreeMap<String, Vec<u8>>,
    pub parts: BTreeMap<String, Vec<u8>>,
    faults: Vec<Planned>,
    /// Everything needs this token.
    pub token: Option<String>,
    /// Where large files are: another host.
    pub cdn: Option<String>,
    /// Where uploads go: another host.
    pub put_host: Option<String>,
    /// Uploads beyond this many bytes come in parts of as many.
    pub part_size: Option<usize>,
    /// Revision answers do not list files, which then come from the tree, so many on a page.
    pub pages_of: Option<usize>,
}

/// A running hub. It lives as long as the process.
#[derive(Clone)]
pub struct Server {
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub fn start() -> Self {
        Self { url: String::new(), state: Arc::default() }.second_address()
    }

    /// The same hub under another address.
    pub fn second_address(&self) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { url, state: self.state.clone() };
        let shared = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = shared.clone();
                thread::spawn(move || {
                    let _ = server.serve(stream);
                });
            }
        });
        server
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Adds a commit to the main branch and returns it. Weights and tables go to the store.
    pub fn commit(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        let stored = |(path, bytes): &(&str, &[u8])| {
            let file = StoredFile { bytes: Arc::new(bytes.to_vec()), lfs: is_large(path) };
            (path.to_string(), file)
        };
        self.add_commit(repo, "main", files.iter().map(stored).collect())
    }

    fn add_commit(&self, repo: &str, branch: &str, files: BTreeMap<String, StoredFile>) -> String {
        let mut state = self.state();
        let known = state.repos.entry(repo.to_owned()).or_default();
        let mut hash = Sha256::new();
        hash.update(format!("{}{branch}", known.commits.len()));
        for (path, file) in &files {
            hash.update(path);
            hash.update(file.bytes.as_slice());
        }
        let commit = hex(&hash.finalize())[..40].to_owned();
        known.commits.push((commit.clone(), files));
        known.branches.insert(branch.to_owned(), commit.clone());
        commit
    }

    /// The next `times` requests with this method whose path has this part go wrong.
    pub fn fail(&self, method: &'static str, part: &str, fault: Fault, times: usize) {
        self.state().faults.push(Planned { method, part: part.to_owned(), fault, times });
    }

    /// What still was to go wrong goes right.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// Requests so far with this method whose path has this part.
    pub fn requests(&self, method: &str, part: &str) -> Vec<Request> {
        let wanted = |request: &&Request| request.method == method && request.path.contains(part);
        self.state().requests.iter().filter(wanted).cloned().collect()
    }

    pub fn forget_requests(&self) {
        self.state().requests.clear();
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let Some(request) = read_request(&mut reader, &stream)? else { return Ok(()) };
        self.state().requests.push(request.clone());
        let fault = self.take_fault(&request);
        let mut reply = match &fault {
            Some(Fault::Close) => return Ok(()),
            Some(Fault::Answer { status, headers, body }) => {
                Reply { status: *status, headers: headers.clone(), body: body.clone().into_bytes() }
            }
            _ => self.answer(&request),
        };
        if matches!(fault, Some(Fault::Corrupt)) {
            *reply.body.last_mut().unwrap() ^= 1;
        }
        if let (200, Some(range), false) =
            (reply.status, request.header("range"), matches!(fault, Some(Fault::WholeFile)))
        {
            reply = reply.ranged(range);
        }
        if let Some(Fault::OtherVersion { etag, body }) = &fault {
            reply.headers.retain(|(name, _)| name != "ETag");
            reply = Reply { body: body.as_bytes().to_vec(), ..reply }.with("ETag", etag);
        }
        let cut = match fault {
            Some(Fault::Drop(bytes) | Fault::Stall(bytes)) => Some(bytes),
            _ => None,
        };
        reply.send(&stream, request.method == "HEAD", cut)?;
        if matches!(fault, Some(Fault::Stall(_))) {
            thread::sleep(Duration::from_secs(5));
        }
        Ok(())
    }

    fn take_fault(&self, request: &Request) -> Option<Fault> {
        let mut state = self.state();
        let fits = |planned: &&mut Planned| {
            planned.times > 0 && planned.method == request.method && request.path.contains(&planned.part)
        };
        let planned = state.faults.iter_mut().find(fits)?;
        planned.times -= 1;
        Some(planned.fault.clone())
    }

    fn answer(&self, request: &Request) -> Reply {
        let (path, _) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let path = decode(path);
        // addresses of the store give access by themselves
        let open = ["/store/", "/put/", "/complete/"].iter().any(|prefix| path.starts_with(prefix));
        let wanted = self.state().token.clone().filter(|_| !open).map(|token| format!("Bearer {token}"));
        if wanted.is_some() && request.header("authorization") != wanted.as_deref() {
            return Reply::code(401, "RepoNotFound");
        }
        if let Some(oid) = path.strip_prefix("/store/") {
            return self.stored(oid);
        }
        if let Some(name) = path.strip_prefix("/put/") {
            let mut state = self.state();
            if name.contains('/') {
                state.parts.insert(name.to_owned(), request.body.clone());
            } else if sha256(&request.body) == name {
                state.store.insert(name.to_owned(), request.body.clone());
            } else {
                return Reply::text(400, "wrong checksum");
            }
            return Reply::text(200, "").with("ETag", &format!("\"part-{}\"", name.rsplit('/').next().unwrap()));
        }
        if path == "/api/repos/create" {
            return self.create(&request.json());
        }
        if let Some(rest) = path.strip_prefix("/api/resolve-cache/") {
            return self.regular_file(rest);
        }
        if let Some(rest) = path.strip_prefix("/api/") {
            return self.api(request, rest);
        }
        if path.ends_with(".git/info/lfs/objects/batch") {
            return self.batch(&request.json());
        }
        if let Some(oid) = path.strip_prefix("/complete/") {
            return self.assemble(oid, &request.json());
        }
        if path == "/verify" {
            let body = request.json();
            let state = self.state();
            let size = state.store.get(body["oid"].as_str().unwrap()).map(Vec::len);
            return Reply::text(if size == Some(body["size"].as_u64().unwrap() as usize) { 200 } else { 404 }, "");
        }
        match path.split_once("/resolve/") {
            Some((repo, rest)) => self.resolve(repo, rest),
            None => Reply::text(404, "nothing here"),
        }
    }

    fn stored(&self, oid: &str) -> Reply {
        let state = self.state();
        let files = state.repos.values().flat_map(|repo| &repo.commits).flat_map(|(_, files)| files.values());
        let found = files.filter(|file| file.lfs).find(|file| file.etag() == oid);
        match found {
            // a store of its own has ETags of its own
            Some(file) => Reply::bytes(file.bytes.to_vec()).with("ETag", "\"md5-of-the-store\""),
            None => Reply::text(403, "expired"),
        }
    }

    fn create(&self, body: &Value) -> Reply {
        let id = format!("{}/{}", body["organization"].as_str().unwrap(), body["name"].as_str().unwrap());
        let repo = format!("models/{id}");
        if self.state().repos.contains_key(&repo) {
            return Reply::json(409, &json!({ "error": "You already created this model repo" }));
        }
        let private = body["visibility"] == "private";
        self.state().repos.insert(repo.clone(), Repo { private, ..Repo::default() });
        self.add_commit(&repo, "main", BTreeMap::new());
        Reply::json(200, &json!({ "url": format!("{}/{id}", self.url) }))
    }

    /// `models/org/name`, then what is asked of it.
    fn api(&self, request: &Request, rest: &str) -> Reply {
        let mut parts = rest.splitn(5, '/');
        let (Some(kind), Some(org), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
            return if rest == "validate-yaml" {
                Reply::json(200, &json!({ "errors": [], "warnings": [] }))
            } else {
                Reply::text(404, "")
            };
        };
        let (verb, argument) = (parts.next().unwrap_or("revision"), parts.next().unwrap_or("main"));
        let key = format!("{kind}/{org}/{name}");
        let Some(repo) = self.state().repos.get(&key).cloned() else { return Reply::code(404, "RepoNotFound") };
        if verb == "branch" {
            let commit = repo.branches["main"].clone();
            self.state().repos.get_mut(&key).unwrap().branches.insert(argument.to_owned(), commit);
            return Reply::text(200, "");
        }
        let Some((commit, files)) = find(&repo, argument) else { return Reply::code(404, "RevisionNotFound") };
        match verb {
            "revision" => {
                let names = files.keys().map(|path| json!({ "rfilename": path }));
                let listed: Vec<Value> = if self.state().pages_of.is_some() { Vec::new() } else { names.collect() };
                let id = format!("{org}/{name}");
                Reply::json(200, &json!({ "id": id, "sha": commit, "private": repo.private, "siblings": listed }))
            }
            "tree" => self.tree(request, rest, &files),
            "preupload" => {
                let body = request.json();
                let answer = body["files"].as_array().unwrap().iter().map(|file| {
                    let path = file["path"].as_str().unwrap();
                    let mode = if is_large(path) { "lfs" } else { "regular" };
                    let oid = files.get(path).map(StoredFile::etag);
                    json!({ "path": path, "uploadMode": mode, "shouldIgnore": path.ends_with(".ignored"), "oid": oid })
                });
                Reply::json(200, &json!({ "files": answer.collect::<Vec<_>>() }))
            }
            "commit" => self.take_commit(request, &key, argument, files),
            _ => Reply::text(404, ""),
        }
    }

    fn tree(&self, request: &Request, rest: &str, files: &BTreeMap<String, StoredFile>) -> Reply {
        let entry = |(path, file): (&String, &StoredFile)| {
            let mut entry = json!({ "type": "file", "path": path, "size": file.bytes.len(), "oid": file.etag() });
            if file.lfs {
                entry["lfs"] = json!({ "oid": file.etag(), "size": file.bytes.len(), "pointerSize": 134 });
            }
            entry
        };
        let mut entries: Vec<Value> = files.iter().map(entry).collect();
        entries.push(json!({ "type": "directory", "path": "some-folder", "oid": "0" }));
        let page = self.state().pages_of.unwrap_or(1000);
        let cursor = request.path.split_once("cursor=").map_or(0, |(_, n)| n.parse().unwrap());
        let next = cursor + page;
        let reply = Reply::json(200, &Value::from(entries[cursor..entries.len().min(next)].to_vec()));
        if next < entries.len() {
            let link = format!("<{}/api/{rest}?recursive=true&cursor={next}>; rel=\"next\"", self.url);
            return reply.with("Link", &link);
        }
        reply
    }

    fn take_commit(
        &self,
        request: &Request,
        key: &str,
        branch: &str,
        mut files: BTreeMap<String, StoredFile>,
    ) -> Reply {
        let text = String::from_utf8(request.body.clone()).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &lines[1..] {
            let value = &line["value"];
            let path = value["path"].as_str().unwrap().to_owned();
            let file = if line["key"] == "lfsFile" {
                let oid = value["oid"].as_str().unwrap();
                let Some(bytes) = self.state().store.get(oid).cloned() else {
                    return Reply::json(400, &json!({ "error": format!("{path} was not uploaded") }));
                };
                StoredFile { bytes: Arc::new(bytes), lfs: true }
            } else {
                let content = BASE64.decode(value["content"].as_str().unwrap()).unwrap();
                StoredFile { bytes: Arc::new(content), lfs: false }
            };
            files.insert(path, file);
        }
        let pull_request = request.path.contains("create_pr=1");
        let commit = self.add_commit(key, if pull_request { "refs/pr/1" } else { branch }, files);
        let id = key.trim_start_matches("models/");
        let pr = pull_request.then(|| format!("{}/{id}/discussions/1", self.url));
        let url = format!("{}/{id}/commit/{commit}", self.url);
        Reply::json(200, &json!({ "success": true, "commitOid": commit, "commitUrl": url, "pullRequestUrl": pr }))
    }

    fn batch(&self, body: &Value) -> Reply {
        let state = self.state();
        let objects = body["objects"].as_array().unwrap().iter().map(|object| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
            if state.store.contains_key(oid) {
                return json!({ "oid": oid, "size": size });
            }
            let verify = json!({ "href": format!("{}/verify", self.url) });
            let host = state.put_host.as_ref().unwrap_or(&self.url);
            let upload = match state.part_size.filter(|&part| size > part) {
                None => json!({ "href": format!("{host}/put/{oid}"), "header": { "x-of-the-action": "yes" } }),
                Some(part) => {
                    let mut header = json!({ "chunk_size": part.to_string() });
                    for n in 1..=size.div_ceil(part) {
                        header[format!("{n:05}")] = format!("{host}/put/{oid}/{n}").into();
                    }
                    json!({ "href": format!("{}/complete/{oid}", self.url), "header": header })
                }
            };
            json!({ "oid": oid, "size": size, "actions": { "upload": upload, "verify": verify } })
        });
        let objects: Vec<Value> = objects.collect();
        Reply::json(200, &json!({ "transfer": "basic", "objects": objects }))
    }

    /// Puts the parts of a large file together.
    fn assemble(&self, oid: &str, body: &Value) -> Reply {
        let mut state = self.state();
        let mut whole = Vec::new();
        for part in body["parts"].as_array().unwrap() {
            let number = part["partNumber"].as_u64().unwrap();
            assert_eq!(part["etag"], format!("\"part-{number}\""));
            whole.extend_from_slice(&state.parts[&format!("{oid}/{number}")]);
        }
        if sha256(&whole) != oid {
            return Reply::text(400, "wrong checksum");
        }
        state.store.insert(oid.to_owned(), whole);
        Reply::text(200, "")
    }

    /// `/org/name` or `/datasets/org/name`, and `revision/path`.
    fn resolve(&self, repo: &str, rest: &str) -> Reply {
        let repo = repo.trim_start_matches('/');
        let key = if repo.starts_with("datasets/") { repo.to_owned() } else { format!("models/{repo}") };
        let Some(known) = self.state().repos.get(&key).cloned() else { return Reply::code(404, "RepoNotFound") };
        let (revision, path) = rest.split_once('/').unwrap();
        let Some((commit, files)) = find(&known, revision) else { return Reply::code(404, "RevisionNotFound") };
        let Some(file) = files.get(path) else {
            return Reply::code(404, "EntryNotFound").with("X-Repo-Commit", &commit);
        };
        let reply = Reply::text(302, "").with("X-Repo-Commit", &commit);
        if !file.lfs {
            return reply.with("Location", &format!("/api/resolve-cache/{key}/{commit}/{path}"));
        }
        let host = self.state().cdn.clone().unwrap_or_else(|| self.url.clone());
        let sha = file.etag();
        reply
            .with("X-Linked-Etag", &format!("\"{sha}\""))
            .with("X-Linked-Size", &file.bytes.len().to_string())
            .with("Location", &format!("{host}/store/{sha}?signature=a%2Fb"))
    }

    fn regular_file(&self, rest: &str) -> Reply {
        let mut parts = rest.splitn(5, '/');
        let mut next = || parts.next().unwrap();
        let key = format!("{}/{}/{}", next(), next(), next());
        let (commit, path) = (next(), next());
        let state = self.state();
        let (_, files) = find(&state.repos[&key], commit).unwrap();
        let file = &files[path];
        Reply::bytes(file.bytes.to_vec()).with("X-Repo-Commit", commit).with("ETag", &format!("W/\"{}\"", file.etag()))
    }
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn text(status: u16, text: &str) -> Self {
        Self { status, headers: Vec::new(), body: text.as_bytes().to_vec() }
    }

    fn bytes(body: Vec<u8>) -> Self {
        Self { status: 200, headers: Vec::new(), body }
    }

    fn json(status: u16, body: &Value) -> Self {
        Self::text(status, &body.to_string()).with("Content-Type", "application/json")
    }

    fn code(status: u16, code: &str) -> Self {
        Self::json(status, &json!({ "error": code })).with("X-Error-Code", code)
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    fn ranged(mut self, range: &str) -> Self {
        let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
        let total = self.body.len();
        if from >= total {
            return Self::text(416, "").with("Content-Range", &format!("bytes */{total}"));
        }
        self.status = 206;
        self.body.drain(..from);
        self.with("Content-Range", &format!("bytes {from}-{}/{total}", total - 1))
    }

    fn send(&self, mut stream: &TcpStream, head: bool, cut: Option<usize>) -> std::io::Result<()> {
        let mut text =
            format!("HTTP/1.1 {} Answer\r\nConnection: close\r\nContent-Length: {}\r\n", self.status, self.body.len());
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{text}\r\n").as_bytes())?;
        if !head {
            stream.write_all(&self.body[..cut.unwrap_or(self.body.len()).min(self.body.len())])?;
        }
        stream.flush()
    }
}

fn read_request(reader: &mut BufReader<TcpStream>, mut stream: &TcpStream) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    if headers.contains_key("expect") {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    assert!(!headers.contains_key("transfer-encoding"), "stores take no bodies of unknown length");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { method, path, headers, body }))
}

fn find(repo: &Repo, revision: &str) -> Option<(String, BTreeMap<String, StoredFile>)> {
    let commit = repo.branches.get(revision).map_or(revision, String::as_str);
    repo.commits.iter().rev().find(|(known, _)| known == commit).cloned()
}

pub fn is_large(path: &str) -> bool {
    [".safetensors", ".gguf", ".bin", ".parquet"].iter().any(|ending| path.ends_with(ending))
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'%' {
            decoded.push(u8::from_str_radix(&text[at + 1..at + 3], 16).unwrap());
            at += 3;
        } else {
            decoded.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8(decoded).unwrap()
}
