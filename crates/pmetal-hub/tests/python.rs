//! Python's `huggingface_hub` as witness: it reads the cache written here, its cache is read here, and its upload is ours.
//!
//! Needs a Python with `huggingface_hub`:
//! `PMETAL_PYTHON=python3 cargo test -p pmetal-hub --test python -- --ignored`

mod common;
mod server;

use std::{fs, path::Path, process::Command};

use common::{files_below, hub, hub_with, wanted};
use pmetal_hub::{RepoId, Upload};
use serde_json::{Value, json};
use server::{Request, Server};
use tempfile::TempDir;

/// Runs a script with a hub and a cache, and returns what it prints.
fn python(server: &Server, space: &TempDir, offline: bool, script: &str) -> String {
    let python = std::env::var("PMETAL_PYTHON").expect("PMETAL_PYTHON names a Python with huggingface_hub");
    let output = Command::new(python)
        .args(["-c", script])
        .env("HF_ENDPOINT", &server.url)
        .env("HF_HOME", space.path())
        .env("HF_HUB_OFFLINE", if offline { "1" } else { "0" })
        .env("HF_HUB_DISABLE_XET", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env("HF_HUB_DISABLE_UPDATE_CHECK", "1")
        .env("HF_TOKEN", "secret")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn model(server: &Server) -> String {
    // Python takes what a redirect says of a file where the redirect leads to another host
    server.state().cdn = Some(server.second_address().url);
    let weights: Vec<u8> = (0..100_000u32).map(|i| (i % 253) as u8).collect();
    server.commit(
        "models/org/name",
        &[
            ("README.md", b"# card"),
            ("additional_chat_templates/tool use.jinja", b"{{ 1 }}"),
            ("config.json", b"{}"),
            ("model.safetensors", &weights),
            ("tokenizer.json", b"{\"a\": 1}"),
        ],
    )
}

#[test]
#[ignore = "needs huggingface_hub: set PMETAL_PYTHON"]
fn python_finds_what_was_downloaded_here() {
    let server = Server::start();
    let commit = model(&server);
    let space = tempfile::tempdir().unwrap();
    let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    let script = "from huggingface_hub import *\nprint(snapshot_download('org/name'))\nprint(hf_hub_download('org/name', 'model.safetensors'))\n\
                  print(hf_hub_download('org/name', 'additional_chat_templates/tool use.jinja'))\n\
                  print([(r.repo_id, r.size_on_disk, sorted(r.refs), len(r.revisions)) for r in scan_cache_dir().repos], scan_cache_dir().warnings)";
    server.forget_requests();
    let printed = python(&server, &space, true, script);
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(Path::new(lines[0]), folder);
    assert_eq!(Path::new(lines[1]), folder.join("model.safetensors"));
    assert_eq!(Path::new(lines[2]), folder.join("additional_chat_templates/tool use.jinja"));
    assert_eq!(lines[3], "[('org/name', 100017, ['main'], 1)] []");
    assert_eq!(server.state().requests.len(), 0);
    // online it loads what we left out, and nothing twice
    python(&server, &space, false, "from huggingface_hub import *\nsnapshot_download('org/name')");
    assert_eq!(server.requests("GET", "/store/").len(), 0);
    assert!(folder.ends_with(commit) && folder.join("README.md").exists());
}

#[test]
#[ignore = "needs huggingface_hub: set PMETAL_PYTHON"]
fn what_python_downloaded_is_found_here() {
    let server = Server::start();
    model(&server);
    for script in [
        "from huggingface_hub import *\nprint(snapshot_download('org/name'))",
        "from huggingface_hub import *\nfor f in ['config.json', 'model.safetensors', 'tokenizer.json']:\n  p = hf_hub_download('org/name', f)\n\
         import os; print(os.path.dirname(p))",
    ] {
        let space = tempfile::tempdir().unwrap();
        let folder = python(&server, &space, false, script);
        server.forget_requests();
        let offline = hub_with(&server, &space, |settings| settings.offline = true);
        let found = offline.download(&wanted("org/name"), &()).unwrap();
        assert_eq!(found, Path::new(&folder));
        assert_eq!(fs::read(found.join("config.json")).unwrap(), b"{}");
        hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
        assert_eq!(server.requests("GET", "/store/").len(), 0);
    }
}

#[test]
#[ignore = "needs huggingface_hub: set PMETAL_PYTHON"]
fn a_folder_that_one_filled_the_other_keeps() {
    let server = Server::start();
    model(&server);
    let space = tempfile::tempdir().unwrap();
    let mine = space.path().join("mine");
    let script =
        format!("from huggingface_hub import *\nprint(snapshot_download('org/name', local_dir='{}'))", mine.display());
    python(&server, &space, false, &script);
    let wanted = pmetal_hub::Wanted { local_dir: Some(mine.clone()), ..wanted("org/name") };
    server.forget_requests();
    hub(&server, &space).download(&wanted, &()).unwrap();
    assert_eq!(server.state().requests.len(), 1, "{:?}", server.state().requests);
    fs::remove_dir_all(&mine).unwrap();
    hub(&server, &space).download(&wanted, &()).unwrap();
    server.forget_requests();
    python(&server, &space, false, &script);
    assert_eq!(server.requests("GET", "/store/").len(), 0);
}

/// A request as far as it should be the same for both.
fn essence(request: &Request) -> Value {
    let body = match request.header("content-type").unwrap_or_default() {
        "application/x-ndjson" => {
            let text = String::from_utf8(request.body.clone()).unwrap();
            let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            lines[1..].sort_by_key(|line| line["value"]["path"].as_str().unwrap().to_owned());
            Value::from(lines)
        }
        kind if kind.contains("json") => {
            let mut body: Value = serde_json::from_slice(&request.body).unwrap();
            if let Some(files) = body.get_mut("files").and_then(Value::as_array_mut) {
                files.sort_by_key(|file| file["path"].as_str().unwrap().to_owned());
            }
            body
        }
        _ => json!(server::sha256(&request.body)),
    };
    let authorized = request.header("authorization").is_some();
    json!({ "method": request.method, "path": request.path, "body": body, "authorized": authorized })
}

#[test]
#[ignore = "needs huggingface_hub: set PMETAL_PYTHON"]
fn an_upload_is_what_python_sends() {
    for part_size in [None, Some(3000)] {
        let space = tempfile::tempdir().unwrap();
        let folder = space.path().join("adapter");
        fs::create_dir(&folder).unwrap();
        let weights: Vec<u8> = (0..10_000u32).map(|i| (i * 7 % 251) as u8).collect();
        fs::write(folder.join("adapter_config.json"), "{\"r\": 4}").unwrap();
        fs::write(folder.join("adapter_model.safetensors"), &weights).unwrap();
        fs::write(folder.join("README.md"), "---\ntags: [x]\n---\n# card\n").unwrap();
        fs::write(folder.join("empty.bin"), "").unwrap();
        // the addresses of the server are in what is compared: one server for both
        let server = Server::start();
        server.state().part_size = part_size;
        let script = format!(
            "from huggingface_hub import *\nimport os\napi = HfApi()\n\
             api.create_repo('me/adapter', private=True, repo_type='model')\n\
             d = '{}'\nops = [CommitOperationAdd(f, os.path.join(d, f)) for f in sorted(os.listdir(d))]\n\
             api.create_commit('me/adapter', ops, commit_message='first')",
            folder.display()
        );
        let sent = |server: &Server| -> Vec<Value> {
            let requests = server.state().requests.clone();
            // what is only asked, and the check of a card, are not part of an upload
            let counts = |r: &&Request| r.method != "GET" && r.path != "/api/validate-yaml";
            requests.iter().filter(counts).map(essence).collect()
        };
        python(&server, &space, false, &script);
        let theirs = sent(&server);
        server.state().repos.clear();
        server.state().store.clear();
        server.forget_requests();
        let hub = hub_with(&server, &space, |settings| settings.token = Some("secret".into()));
        let repo = RepoId::parse("me/adapter").unwrap();
        let upload = Upload { folder: &folder, repo, private: true, message: Some("first"), create_pr: false };
        hub.upload(&upload, &()).unwrap();
        let ours = sent(&server);
        assert_eq!(ours.len(), theirs.len(), "{ours:#?}\n{theirs:#?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours, theirs);
        }
        assert_eq!(files_below(&folder).len(), 4);
    }
}
