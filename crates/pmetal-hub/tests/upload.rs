//! Uploads against a local server: what it holds afterwards, and what was sent to whom.

mod common;
mod server;

use std::{fs, path::Path};

use common::{Log, hub, hub_with, text};
use pmetal_hub::{Choice, Error, Hub, Kind, RepoId, Upload, Uploaded, Wanted};
use server::{Fault, Server, sha256, status};
use tempfile::TempDir;

const ADAPTER: &str =
    r#"{"base_model_name_or_path": "org/base", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}"#;

/// A run's folder with an adapter of `bytes`.
fn run_folder(space: &TempDir, bytes: &[u8]) -> std::path::PathBuf {
    let folder = space.path().join("run");
    fs::create_dir_all(folder.join("checkpoint-5")).unwrap();
    fs::write(folder.join("adapter_config.json"), ADAPTER).unwrap();
    fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    fs::write(folder.join("metrics.jsonl"), "{\"step\":1,\"loss\":2.5}\n").unwrap();
    fs::write(folder.join("checkpoint-5/optimizer.safetensors"), "large").unwrap();
    fs::write(folder.join(".hidden"), "x").unwrap();
    fs::write(folder.join("notes.ignored"), "x").unwrap();
    fs::write(folder.join("empty.bin"), "").unwrap();
    folder
}

fn upload<'a>(folder: &'a Path, id: &str) -> Upload<'a> {
    Upload { folder, repo: RepoId::parse(id).unwrap(), private: false, message: None, create_pr: false }
}

fn signed_in(server: &Server, space: &TempDir) -> Hub {
    hub_with(server, space, |settings| settings.token = Some("secret".into()))
}

/// Everything of a repository, downloaded again.
fn download(server: &Server, space: &TempDir, id: &str) -> std::path::PathBuf {
    let choice = Choice::Matching { include: vec!["*".into()], exclude: vec![] };
    let wanted = Wanted { choice, ..Wanted::new(Kind::Model, RepoId::parse(id).unwrap()) };
    signed_in(server, space).download(&wanted, &()).unwrap()
}

#[test]
fn an_adapter_arrives_whole_in_one_piece_and_in_parts() {
    let bytes: Vec<u8> = (0..10_000u32).map(|i| (i * 7 % 251) as u8).collect();
    for part_size in [None, Some(3000)] {
        let server = Server::start();
        server.state().token = Some("secret".into());
        server.state().part_size = part_size;
        let space = tempfile::tempdir().unwrap();
        let folder = run_folder(&space, &bytes);
        let log = Log::default();
        let done = signed_in(&server, &space).upload(&upload(&folder, "me/adapter"), &log).unwrap();
        assert!(done.commit_url.starts_with(&format!("{}/me/adapter/commit/", server.url)), "{done:?}");
        assert_eq!(done.pull_request_url, None);
        assert_eq!(log.bytes("adapter_model.safetensors"), bytes.len() as u64);
        assert!(log.notes().concat().contains("checkpoint folders are left out: 1"), "{:?}", log.notes());

        let back = download(&server, &space, "me/adapter");
        let names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "empty.bin", "metrics.jsonl"];
        assert_eq!(common::files_below(&back), names);
        assert_eq!(fs::read(back.join("adapter_model.safetensors")).unwrap(), bytes);
        assert_eq!(text(back.join("adapter_config.json")), ADAPTER);
        assert!(text(back.join("README.md")).starts_with("---\nbase_model: org/base\nlibrary_name: peft\n"));
        assert!(!folder.join("README.md").exists(), "the folder is read, not written");

        let puts = server.requests("PUT", "/put/");
        assert_eq!(puts.len(), if part_size.is_some() { 4 } else { 1 });
        assert!(puts.iter().all(|put| put.header("content-length").is_some()));
        if part_size.is_none() {
            assert_eq!(puts[0].header("x-of-the-action"), Some("yes"));
        }
        let verify = server.requests("POST", "/verify");
        assert_eq!(verify[0].json()["oid"], sha256(&bytes));
    }
}

#[test]
fn a_store_elsewhere_gets_no_token() {
    let server = Server::start();
    let store = server.second_address();
    server.state().token = Some("secret".into());
    server.state().put_host = Some(store.url.clone());
    let space = tempfile::tempdir().unwrap();
    let folder = run_folder(&space, b"weights");
    signed_in(&server, &space).upload(&upload(&folder, "me/adapter"), &()).unwrap();
    let puts = server.requests("PUT", "/put/");
    let host = store.url.trim_start_matches("http://");
    assert_eq!((puts.len(), puts[0].header("host"), puts[0].header("authorization")), (1, Some(host), None));
}

#[test]
fn what_fails_on_the_way_is_sent_again() {
    let server = Server::start();
    server.state().part_size = Some(400);
    server.fail("PUT", "/put/", status(500), 1);
    server.fail("PUT", "/2", Fault::Close, 2);
    server.fail("POST", "/preupload/", status(503), 1);
    server.fail("POST", "/batch", Fault::Close, 1);
    let space = tempfile::tempdir().unwrap();
    let folder = run_folder(&space, &[7; 1000]);
    signed_in(&server, &space).upload(&upload(&folder, "me/adapter"), &()).unwrap();
    let back = download(&server, &space, "me/adapter");
    assert_eq!(fs::read(back.join("adapter_model.safetensors")).unwrap(), [7; 1000]);
}

#[test]
fn a_second_upload_sends_what_changed_and_leaves_the_card_alone() {
    let server = Server::start();
    let space = tempfile::tempdir().unwrap();
    let folder = run_folder(&space, b"weights");
    let hub = signed_in(&server, &space);
    server.commit("models/me/adapter", &[("README.md", b"written by hand")]);
    hub.upload(&upload(&folder, "me/adapter"), &()).unwrap();
    fs::write(folder.join("metrics.jsonl"), "{}\n").unwrap();
    server.forget_requests();
    hub.upload(&Upload { message: Some("second"), ..upload(&folder, "me/adapter") }, &()).unwrap();
    assert_eq!(server.requests("PUT", "").len(), 0, "the store has the weights");
    let commit = String::from_utf8(server.requests("POST", "/commit/main")[0].body.clone()).unwrap();
    assert!(
        commit.starts_with("{\"key\":\"header\",\"value\":{\"summary\":\"second\",\"description\":\"\"}}\n"),
        "{commit}"
    );
    let back = download(&server, &space, "me/adapter");
    assert_eq!(text(back.join("README.md")), "written by hand");
    assert_eq!(text(back.join("metrics.jsonl")), "{}\n");
    // a card in the folder is the one that counts
    fs::write(folder.join("README.md"), "mine").unwrap();
    hub.upload(&upload(&folder, "me/adapter"), &()).unwrap();
    assert_eq!(text(download(&server, &space, "me/adapter").join("README.md")), "mine");
}

#[test]
fn branches_and_pull_requests() {
    let server = Server::start();
    let space = tempfile::tempdir().unwrap();
    let folder = run_folder(&space, b"weights");
    let hub = signed_in(&server, &space);
    hub.upload(&upload(&folder, "me/adapter"), &()).unwrap();
    let main = server.state().repos["models/me/adapter"].branches["main"].clone();
    fs::write(folder.join("metrics.jsonl"), "{}\n").unwrap();
    hub.upload(&upload(&folder, "me/adapter@try/2"), &()).unwrap();
    assert_eq!(text(download(&server, &space, "me/adapter@try/2").join("metrics.jsonl")), "{}\n");
    let Uploaded { pull_request_url, .. } =
        hub.upload(&Upload { create_pr: true, ..upload(&folder, "me/adapter") }, &()).unwrap();
    assert_eq!(pull_request_url, Some(format!("{}/me/adapter/discussions/1", server.url)));
    assert_eq!(server.state().repos["models/me/adapter"].branches["main"], main);
    assert_eq!(server.requests("POST", "create_pr=1").len(), 2);
}

#[test]
fn refusals_say_what_to_do() {
    let server = Server::start();
    let space = tempfile::tempdir().unwrap();
    let folder = run_folder(&space, b"weights");
    let what = upload(&folder, "me/adapter");
    assert!(matches!(hub(&server, &space).upload(&what, &()), Err(Error::NoToken)));
    let offline = hub_with(&server, &space, |settings| settings.offline = true);
    assert!(matches!(offline.upload(&what, &()), Err(Error::OfflineUpload)));
    let hub = signed_in(&server, &space);
    let other = tempfile::tempdir().unwrap();
    let message = hub.upload(&upload(other.path(), "me/adapter"), &()).unwrap_err().to_string();
    assert!(message.contains("adapter_config.json") && message.contains(other.path().to_str().unwrap()), "{message}");
    assert_eq!(server.state().requests.len(), 0, "nothing is asked before that is known");

    server.fail("POST", "/repos/create", status(401), 1);
    let message = hub.upload(&what, &()).unwrap_err().to_string();
    assert!(message.contains("401") && message.contains("token"), "{message}");
    server.commit("models/me/open", &[("README.md", b"r")]);
    let message = hub.upload(&Upload { private: true, ..upload(&folder, "me/open") }, &()).unwrap_err().to_string();
    assert!(message.contains("me/open is there already and public"), "{message}");
    hub.upload(&Upload { private: true, ..what.clone() }, &()).unwrap();
    assert!(server.state().repos["models/me/adapter"].private);
    hub.upload(&Upload { private: true, ..what.clone() }, &()).unwrap();

    // a commit that may have been made is not made twice
    server.forget_requests();
    server.fail("POST", "/commit/", Fault::Close, 1);
    hub.upload(&what, &()).unwrap_err();
    assert_eq!(server.requests("POST", "/commit/").len(), 1);
}
