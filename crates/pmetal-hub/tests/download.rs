//! Downloads against a local server: the cache's layout, redirects, ranges, dropped connections, refusals, waits.

mod common;
mod server;

use std::{fs, path::Path, time::Duration};

use common::{Log, hub, hub_with, text, wanted};
use pmetal_hub::{Choice, Error, Hub, Kind, RepoId, Settings, Wanted};
use server::{Fault, Server, error_code, retry_after, sha256, status};

/// Random enough to show a byte in the wrong place.
fn weights(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

/// A hub with one model, its commit, and a cache of the test's own.
fn model(server: &Server, bytes: &[u8]) -> String {
    server.commit(
        "models/org/name",
        &[
            (".gitattributes", b"x"),
            ("README.md", b"# card"),
            ("additional_chat_templates/a b.jinja", b"{{ 1 }}"),
            ("config.json", b"{}"),
            ("model.safetensors", bytes),
            ("pytorch_model.bin", b"pickle"),
            ("tokenizer.json", b"{\"a\": 1}"),
        ],
    )
}

#[test]
fn a_snapshot_lies_where_python_looks_for_it() {
    let server = Server::start();
    let bytes = weights(300_000);
    let commit = model(&server, &bytes);
    let space = tempfile::tempdir().unwrap();
    let log = Log::default();
    let folder = hub(&server, &space).download(&wanted("org/name"), &log).unwrap();

    let repo = space.path().join("hub/models--org--name");
    assert_eq!(folder, repo.join("snapshots").join(&commit));
    assert_eq!(text(repo.join("refs/main")), commit);
    let link = fs::read_link(folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&bytes)));
    let nested = fs::read_link(folder.join("additional_chat_templates/a b.jinja")).unwrap();
    assert_eq!(nested, Path::new("../../../blobs").join(&sha256(b"{{ 1 }}")[..40]));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
    assert_eq!(text(folder.join("additional_chat_templates/a b.jinja")), "{{ 1 }}");
    let names = common::files_below(&folder);
    assert_eq!(names, ["additional_chat_templates/a b.jinja", "config.json", "model.safetensors", "tokenizer.json"]);
    let blobs = common::files_below(&repo.join("blobs"));
    assert_eq!(blobs.len(), 4, "{blobs:?}");
    assert_eq!(log.bytes("model.safetensors"), bytes.len() as u64);

    // again: one question what main is, no file
    server.forget_requests();
    assert_eq!(hub(&server, &space).download(&wanted("org/name"), &()).unwrap(), folder);
    assert_eq!(server.state().requests.len(), 1);
    // by commit: no question at all
    server.forget_requests();
    assert_eq!(hub(&server, &space).download(&wanted(&format!("org/name@{commit}")), &()).unwrap(), folder);
    assert_eq!(server.state().requests.len(), 0);
}

#[test]
fn a_new_commit_shares_what_did_not_change() {
    let server = Server::start();
    let bytes = weights(5000);
    let first = model(&server, &bytes);
    let space = tempfile::tempdir().unwrap();
    hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    let second = server.commit("models/org/name", &[("config.json", b"{\"v\": 2}"), ("model.safetensors", &bytes)]);
    server.forget_requests();
    let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    assert!(folder.ends_with(&second));
    assert_eq!(text(folder.join("config.json")), "{\"v\": 2}");
    assert_eq!(server.requests("GET", "/store/").len(), 0, "the weights are here already");
    // the older one is still there under its commit, and under a branch that points to it
    server.state().repos.get_mut("models/org/name").unwrap().branches.insert("feature/x".into(), first.clone());
    let old = hub(&server, &space).download(&wanted("org/name@feature/x"), &()).unwrap();
    assert!(old.ends_with(&first));
    assert_eq!(text(space.path().join("hub/models--org--name/refs/feature/x")), first);
}

#[test]
fn a_token_goes_to_the_hub_and_to_no_other_host() {
    let (server, cdn) = (Server::start(), Server::start());
    let bytes = weights(1000);
    for host in [&server, &cdn] {
        model(host, &bytes);
    }
    server.state().token = Some("secret".into());
    // another name for the same machine is another host
    server.state().cdn = Some(cdn.url.clone());
    let space = tempfile::tempdir().unwrap();
    let hub = hub_with(&server, &space, |settings| settings.token = Some("secret".into()));
    let folder = hub.download(&wanted("org/name"), &()).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
    let asked = cdn.state().requests.clone();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].header("authorization"), None);
    assert!(asked[0].path.ends_with("?signature=a%2Fb"));
    assert!(server.state().requests.iter().all(|r| r.header("authorization") == Some("Bearer secret")));
}

#[test]
fn a_connection_that_drops_again_and_again_is_resumed() {
    let server = Server::start();
    let bytes = weights(1_000_000);
    model(&server, &bytes);
    // more often than patience allows without a byte between
    server.fail("GET", "/store/", Fault::Drop(130_000), 7);
    server.fail("GET", "config.json", Fault::Close, 2);
    let space = tempfile::tempdir().unwrap();
    let log = Log::default();
    let folder = hub(&server, &space).download(&wanted("org/name"), &log).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
    let ranges: Vec<Option<String>> =
        server.requests("GET", "/store/").iter().map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges.len(), 8);
    assert_eq!(ranges[0], None);
    assert_eq!(ranges[1].as_deref(), Some("bytes=130000-"));
    assert_eq!(ranges[7].as_deref(), Some("bytes=910000-"));
    assert_eq!(log.bytes("model.safetensors"), bytes.len() as u64, "no byte is loaded twice");
    assert!(
        log.notes().iter().any(|note| note.contains("broke") && note.contains("trying again")),
        "{:?}",
        log.notes()
    );
}

#[test]
fn a_download_that_was_given_up_goes_on_where_it_stopped() {
    let server = Server::start();
    let bytes = weights(200_000);
    model(&server, &bytes);
    server.fail("GET", "/store/", Fault::Drop(150_000), 1);
    server.fail("GET", "/store/", Fault::Close, 20);
    let space = tempfile::tempdir().unwrap();
    let message = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(
        message.starts_with("model.safetensors: the transfer broke off 5 times") && message.contains("run again"),
        "{message}"
    );
    let blobs = space.path().join("hub/models--org--name/blobs");
    let incomplete = blobs.join(format!("{}.incomplete", sha256(&bytes)));
    assert_eq!(fs::metadata(&incomplete).unwrap().len(), 150_000);
    let repo = space.path().join("hub/models--org--name");
    assert!(!repo.join("refs/main").exists(), "main stands for whole snapshots only");

    server.clear_faults();
    server.forget_requests();
    let log = Log::default();
    let folder = hub(&server, &space).download(&wanted("org/name"), &log).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
    assert_eq!(server.requests("GET", "/store/")[0].header("range"), Some("bytes=150000-"));
    assert_eq!(log.starts("model.safetensors"), [(Some(200_000), 150_000)]);
    assert!(!incomplete.exists());
}

#[test]
fn a_server_without_ranges_sends_the_whole_file_again() {
    let server = Server::start();
    let bytes = weights(50_000);
    model(&server, &bytes);
    server.fail("GET", "/store/", Fault::Drop(30_000), 1);
    server.fail("GET", "/store/", Fault::WholeFile, 1);
    let space = tempfile::tempdir().unwrap();
    let log = Log::default();
    let folder = hub(&server, &space).download(&wanted("org/name"), &log).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
    assert_eq!(log.starts("model.safetensors"), [(Some(50_000), 0), (Some(50_000), 0)]);
}

#[test]
fn what_is_left_of_another_file_is_not_built_upon() {
    let server = Server::start();
    let bytes = weights(50_000);
    model(&server, &bytes);
    let space = tempfile::tempdir().unwrap();
    let blobs = space.path().join("hub/models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    for (left, what) in [(vec![7; 20_000], "other bytes"), (vec![7; 60_000], "too many"), (vec![7; 50_000], "as many")]
    {
        fs::write(blobs.join(format!("{}.incomplete", sha256(&bytes))), &left).unwrap();
        let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes, "{what}");
        fs::remove_dir_all(space.path().join("hub/models--org--name/snapshots")).unwrap();
        fs::remove_file(blobs.join(sha256(&bytes))).unwrap();
    }
}

#[test]
fn a_regular_file_of_another_version_is_not_appended() {
    let server = Server::start();
    let commit = model(&server, &weights(10));
    let space = tempfile::tempdir().unwrap();
    let etag = &sha256(b"{\"a\": 1}")[..40];
    let blobs = space.path().join("hub/models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{etag}.incomplete")), b"{\"a").unwrap();
    let later = Fault::OtherVersion { etag: "\"another\"", body: "\": 2}" };
    // the first request is redirected to the second
    server.fail("GET", &format!("/{commit}/tokenizer.json"), Fault::None, 1);
    server.fail("GET", &format!("/{commit}/tokenizer.json"), later, 1);
    let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    assert_eq!(text(folder.join("tokenizer.json")), "{\"a\": 1}");
}

#[test]
fn bytes_that_are_not_those_announced_are_thrown_away() {
    let server = Server::start();
    let bytes = weights(10_000);
    model(&server, &bytes);
    server.fail("GET", "/store/", Fault::Corrupt, 1);
    let space = tempfile::tempdir().unwrap();
    let message = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: sha256 is") && message.contains(&sha256(&bytes)), "{message}");
    let blobs = common::files_below(&space.path().join("hub/models--org--name/blobs"));
    assert!(blobs.iter().all(|blob| !blob.starts_with(&sha256(&bytes))), "{blobs:?}");
    let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
}

#[test]
fn a_busy_hub_is_waited_for() {
    let server = Server::start();
    model(&server, &weights(10));
    let soon = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(1));
    server.fail("GET", "/revision/", retry_after("1"), 1);
    server.fail("GET", "/revision/", retry_after(&soon), 1);
    server.fail("HEAD", "config.json", status(503), 2);
    server.fail("GET", "/store/", status(500), 1);
    let space = tempfile::tempdir().unwrap();
    let log = Log::default();
    hub(&server, &space).download(&wanted("org/name"), &log).unwrap();
    let notes = log.notes();
    assert!(notes.iter().any(|note| note.contains("answers 429") && note.contains("in 1 s")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("answers 503")), "{notes:?}");

    // not for ever
    server.fail("GET", "/revision/", retry_after("86400"), 1);
    fs::remove_dir_all(space.path().join("hub")).unwrap();
    let error = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err();
    assert!(matches!(error, Error::RateLimited { seconds: 86400, .. }), "{error}");
    server.fail("GET", "/revision/", retry_after("0"), 50);
    let error = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err();
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    assert!(server.requests("GET", "/revision/").len() < 20);
}

#[test]
fn a_silent_connection_is_given_up_and_resumed() {
    let server = Server::start();
    let bytes = weights(10_000);
    model(&server, &bytes);
    server.fail("GET", "/store/", Fault::Stall(4000), 1);
    let space = tempfile::tempdir().unwrap();
    let hub = hub_with(&server, &space, |settings| settings.patience.silence = Duration::from_millis(300));
    let folder = hub.download(&wanted("org/name"), &()).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), bytes);
    assert_eq!(server.requests("GET", "/store/")[1].header("range"), Some("bytes=4000-"));
}

#[test]
fn refusals_say_what_to_do() {
    let server = Server::start();
    model(&server, &weights(10));
    let space = tempfile::tempdir().unwrap();
    let refusal = |id: &str, signed_in: bool| {
        let hub = hub_with(&server, &space, |settings| settings.token = signed_in.then(|| "t".into()));
        hub.download(&wanted(id), &()).unwrap_err().to_string()
    };
    let says = |message: String, parts: &[&str]| {
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
        assert!(!message.contains('\n'), "{message}");
    };
    says(refusal("org/nothing", false), &["no model org/nothing", "check the spelling", "HF_TOKEN"]);
    says(refusal("org/nothing", true), &["no model org/nothing that your token may see"]);
    says(refusal("org/name@v9", false), &["org/name has no revision 'v9'", &format!("{}/org/name", server.url)]);
    says(refusal("org/name@../x", false), &["no revision"]);
    for code in [401, 403] {
        server.fail("GET", "/revision/", error_code(code, "GatedRepo"), 1);
        says(refusal("org/name", false), &["gated", "accept its licence on", "/org/name", "HF_TOKEN"]);
    }
    server.fail("GET", "/revision/", status(401), 1);
    says(refusal("org/name", false), &["401", "set HF_TOKEN", "licence"]);
    server.fail("GET", "/revision/", status(401), 1);
    says(refusal("org/name", true), &["401", "not valid"]);
    let body = "{\"error\": \"no entry\"}".to_owned();
    server.fail("GET", "/revision/", Fault::Answer { status: 403, headers: vec![], body }, 1);
    says(refusal("org/name", true), &["403", "accept the licence", "no entry"]);
    server.fail("HEAD", "config.json", error_code(404, "EntryNotFound"), 1);
    says(refusal("org/name", false), &["no file 'config.json' at revision main"]);
    let html = Fault::Answer { status: 200, headers: vec![], body: "<html>sign in to the hotel</html>".into() };
    server.fail("GET", "/revision/", html, 1);
    says(refusal("org/name", false), &["does not answer as a hub", "proxies"]);
    server.fail("GET", "/revision/", status(418), 1);
    says(refusal("org/name", false), &["/revision/main answers 418"]);
}

#[test]
fn redirects_do_not_go_round_for_ever() {
    let server = Server::start();
    model(&server, &weights(10));
    let round = Fault::Answer { status: 302, headers: vec![("Location".into(), "main".into())], body: String::new() };
    server.fail("GET", "/revision/", round, 99);
    let space = tempfile::tempdir().unwrap();
    let message = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(message.contains("more than 10 redirects"), "{message}");
}

#[test]
fn an_unwritable_cache_is_named() {
    let server = Server::start();
    model(&server, &weights(10));
    let space = tempfile::tempdir().unwrap();
    fs::write(space.path().join("hub"), "a file").unwrap();
    let message = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(message.starts_with("cannot create") && message.contains("hub/models--org--name"), "{message}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let server = Server::start();
    let bytes = weights(1000);
    model(&server, &bytes);
    let space = tempfile::tempdir().unwrap();
    let blobs = space.path().join("hub/models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let incomplete = blobs.join(format!("{}.incomplete", sha256(&bytes)));
    std::os::unix::fs::symlink("/dev/full", &incomplete).unwrap();
    let message = hub(&server, &space).download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(message.starts_with("cannot write") && message.contains(".incomplete"), "{message}");
}

#[test]
fn two_downloads_at_once_do_not_disturb_each_other() {
    let server = Server::start();
    let bytes = weights(400_000);
    model(&server, &bytes);
    let space = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..4).map(|_| scope.spawn(|| hub(&server, &space).download(&wanted("org/name"), &()).unwrap())).collect();
        for run in runs {
            assert_eq!(fs::read(run.join().unwrap().join("model.safetensors")).unwrap(), bytes);
        }
    });
    assert_eq!(server.requests("GET", "/store/").len(), 1, "the others waited");
}

#[test]
fn long_lists_come_page_by_page() {
    let server = Server::start();
    model(&server, &weights(10));
    server.state().pages_of = Some(3);
    let space = tempfile::tempdir().unwrap();
    let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    assert_eq!(common::files_below(&folder).len(), 4);
    assert_eq!(server.requests("GET", "/tree/").len(), 3);
}

#[test]
fn files_by_name_and_by_pattern() {
    let server = Server::start();
    server.commit("models/org/gguf", &[("m-Q4_K_M.gguf", b"four"), ("m-Q8_0.gguf", b"eight"), ("README.md", b"r")]);
    server.commit("datasets/org/rows", &[("data/a.jsonl", b"{}"), ("README.md", b"r"), ("b.parquet", b"p")]);
    let space = tempfile::tempdir().unwrap();
    let hub = hub(&server, &space);
    let file = hub.download(&wanted("org/gguf:q8_0"), &()).unwrap();
    assert_eq!((text(&file).as_str(), file.file_name().unwrap().to_str().unwrap()), ("eight", "m-Q8_0.gguf"));
    assert!(matches!(hub.download(&wanted("org/gguf"), &()), Err(Error::SeveralGguf { .. })));
    let repo = RepoId::parse("org/rows").unwrap();
    let rows = hub.download(&Wanted::new(Kind::Dataset, repo.clone()), &()).unwrap();
    assert_eq!(common::files_below(&rows), ["b.parquet", "data/a.jsonl"]);
    assert!(rows.starts_with(space.path().join("hub/datasets--org--rows")));
    let choice = Choice::Matching { include: vec!["*.md".into()], exclude: vec![] };
    let cards = hub.download(&Wanted { choice, ..Wanted::new(Kind::Dataset, repo) }, &()).unwrap();
    assert_eq!(text(cards.join("README.md")), "r");
}

#[test]
fn a_folder_of_ones_own_is_filled_and_kept_up_to_date() {
    let server = Server::start();
    model(&server, &weights(10));
    let space = tempfile::tempdir().unwrap();
    let target = space.path().join("mine");
    let wanted = Wanted { local_dir: Some(target.clone()), ..wanted("org/name") };
    assert_eq!(hub(&server, &space).download(&wanted, &()).unwrap(), target);
    assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), weights(10));
    assert!(!space.path().join("hub").exists(), "the cache is not used");
    server.forget_requests();
    hub(&server, &space).download(&wanted, &()).unwrap();
    assert_eq!(server.state().requests.len(), 1);
    server.commit("models/org/name", &[("config.json", b"{\"v\": 2}"), ("model.safetensors", &weights(10))]);
    server.forget_requests();
    hub(&server, &space).download(&wanted, &()).unwrap();
    assert_eq!(text(target.join("config.json")), "{\"v\": 2}");
    assert_eq!(server.requests("GET", "/store/").len(), 0);
}

#[test]
fn without_a_network_the_cache_has_to_do() {
    let server = Server::start();
    let bytes = weights(1000);
    let commit = model(&server, &bytes);
    let space = tempfile::tempdir().unwrap();
    let offline = hub_with(&server, &space, |settings| settings.offline = true);
    let message = offline.download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(message.contains("org/name is not in the cache") && message.contains("HF_HUB_OFFLINE"), "{message}");
    let nobody = Settings { endpoint: "http://127.0.0.1:9".into(), ..common::settings(&server, &space) };
    let away = Hub::new(nobody);
    let message = away.download(&wanted("org/name"), &()).unwrap_err().to_string();
    assert!(message.contains("cannot reach http://127.0.0.1:9") && message.contains("HF_ENDPOINT"), "{message}");

    let folder = hub(&server, &space).download(&wanted("org/name"), &()).unwrap();
    server.forget_requests();
    assert_eq!(offline.download(&wanted("org/name"), &()).unwrap(), folder);
    assert_eq!(server.state().requests.len(), 0);
    let log = Log::default();
    assert_eq!(away.download(&wanted("org/name"), &log).unwrap(), folder);
    assert!(log.notes().concat().contains("using the cached snapshot of org/name"), "{:?}", log.notes());
    server.fail("GET", "/revision/", status(503), 9);
    assert_eq!(hub(&server, &space).download(&wanted("org/name"), &()).unwrap(), folder);
    server.clear_faults();
    // a refusal is no outage
    server.fail("GET", "/revision/", error_code(401, "GatedRepo"), 1);
    assert!(matches!(hub(&server, &space).download(&wanted("org/name"), &()), Err(Error::Gated { .. })));

    // a part of a snapshot is not a snapshot
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    for hub in [&offline, &away] {
        let message = hub.download(&wanted("org/name"), &()).unwrap_err().to_string();
        assert!(message.contains("lacks tokenizer.json"), "{message}");
    }
    assert!(folder.ends_with(commit));
}

#[test]
fn a_cache_that_nobody_noted_is_judged_by_its_files() {
    let server = Server::start();
    let space = tempfile::tempdir().unwrap();
    let offline = hub_with(&server, &space, |settings| settings.offline = true);
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let repo = space.path().join("hub/models--org--name");
    let folder = repo.join("snapshots").join(commit);
    fs::create_dir_all(&folder).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), commit).unwrap();
    let put = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    let lacks = |what: &str| {
        let message = offline.download(&wanted("org/name"), &()).unwrap_err().to_string();
        assert!(message.contains(&format!("lacks {what}")), "{message}");
    };
    put("config.json", "{}");
    lacks("its safetensors");
    put("model.safetensors.index.json", r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#);
    put("model-1.safetensors", "");
    lacks("model-2.safetensors");
    put("model-2.safetensors", "");
    assert_eq!(offline.download(&wanted("org/name"), &()).unwrap(), folder);
    // Python's own list of what there should be
    fs::create_dir_all(repo.join("trees")).unwrap();
    let tree = r#"{"format_version": 1, "files": {"config.json": {"size": 1, "blob_id": "a"}, "tokenizer.json": {"size": 1, "blob_id": "b"}}}"#;
    fs::write(repo.join(format!("trees/{commit}.json")), tree).unwrap();
    lacks("tokenizer.json");
}
