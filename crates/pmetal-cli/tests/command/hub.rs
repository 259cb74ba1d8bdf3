//! Models by id: the command against a local hub, with a cache of the test's own.

use std::{ffi::OsStr, fs, path::Path};

use crate::{
    common::{
        Ran, Space, chat_model, column, command, finish, metrics, model, quickstart, read_json, rows, says, tensors,
    },
    hub_server::{Fault, Server, error_code},
};

/// Runs the command with this hub, a home of its own and no network but this.
fn at<S: AsRef<OsStr>>(server: &Server, space: &Space, args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = command(args);
    command.env("HF_ENDPOINT", &server.url).env("HF_HOME", space.path("hf")).env("HF_TOKEN", "secret");
    for name in [
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ] {
        command.env_remove(name);
    }
    finish(&mut command)
}

fn succeed<S: AsRef<OsStr>>(server: &Server, space: &Space, args: impl IntoIterator<Item = S>) -> Ran {
    let ran = at(server, space, args);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran
}

/// The one line that says why not.
fn refused<S: AsRef<OsStr>>(server: &Server, space: &Space, code: i32, args: impl IntoIterator<Item = S>) -> String {
    let ran = at(server, space, args);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(code), ""), "{}", ran.stderr);
    let last = ran.stderr.lines().last().unwrap_or_default().to_owned();
    last.strip_prefix("error: ").unwrap_or_else(|| panic!("{}", ran.stderr)).to_owned()
}

/// Puts the files of a folder into a repository.
fn publish(server: &Server, id: &str, folder: &str) -> String {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let files: Vec<(String, Vec<u8>)> =
        paths.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())).collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    server.commit(&format!("models/{id}"), &files)
}

#[test]
fn a_model_is_downloaded_once_and_its_folder_printed() {
    let (server, space) = (Server::start(), Space::new());
    let commit = publish(&server, "org/tiny", &model("llama"));
    server.fail("GET", "/store/", Fault::Drop(1000), 1);
    let ran = succeed(&server, &space, ["download", "org/tiny"]);
    let folder = space.path(&format!("hf/hub/models--org--tiny/snapshots/{commit}"));
    assert_eq!(ran.stdout, format!("{folder}\n"));
    let weights = fs::read(Path::new(&model("llama")).join("model.safetensors")).unwrap();
    assert_eq!(fs::read(Path::new(&folder).join("model.safetensors")).unwrap(), weights);
    says(&ran.stderr, &["downloading model.safetensors (", "downloading config.json (", "trying again in 1 s"]);
    assert!(!ran.stderr.contains('\r') && !ran.stderr.contains('\x1b'), "{}", ran.stderr);
    let again = succeed(&server, &space, ["download", "org/tiny"]);
    assert_eq!((again.stdout, again.stderr.as_str()), (ran.stdout, ""));

    let target = space.path("here");
    let args = ["download", "org/tiny", "--revision", &commit, "--include", "*.json", "--local-dir", &target];
    assert_eq!(succeed(&server, &space, args).stdout, format!("{target}\n"));
    assert!(Path::new(&target).join("config.json").exists());
    assert!(!Path::new(&target).join("model.safetensors").exists());
}

#[test]
fn an_id_trains_and_runs_as_its_folder_does() {
    let (server, space) = (Server::start(), Space::new());
    publish(&server, "org/tiny", &model("llama"));
    let run = |name: &str, model: &str| {
        let (rows, output) = (rows(), space.path(name));
        succeed(
            &server,
            &space,
            ["train", "--model", model, "--dataset", &rows, "--output", &output, "--max-steps", "2"],
        );
        output
    };
    let (by_path, by_id) = (run("by-path", &model("llama")), run("by-id", "org/tiny"));
    assert_eq!(column(&metrics(&by_path), "loss"), column(&metrics(&by_id), "loss"));
    let config = read_json(Path::new(&by_id).join("adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], "org/tiny", "the id travels, not the place in the cache");

    // the adapter goes up, and comes back by its id
    let up = succeed(&server, &space, ["upload", &by_id, "me/adapter", "--private"]);
    assert!(up.stdout.starts_with(&format!("{}/me/adapter/commit/", server.url)), "{}", up.stdout);
    says(&up.stderr, &["uploading adapter_model.safetensors ("]);
    let card = &server.state().repos["models/me/adapter"].commits.last().unwrap().1["README.md"].bytes.clone();
    says(
        &String::from_utf8_lossy(card),
        &["base_model: org/tiny", "--model org/tiny --lora me/adapter", "| steps | 2 |"],
    );
    let ids = space.write("ids.json", "[[5, 17, 42, 8, 90]]");
    let logits = |name: &str, model: &str, lora: &str| {
        let output = space.path(name);
        let args = ["logits", "--dtype", "f32", "--ids", &ids, "--output", &output, "--model", model, "--lora", lora];
        succeed(&server, &space, args);
        tensors(output)
    };
    assert_eq!(logits("a", &model("llama"), &by_id), logits("b", "org/tiny", "me/adapter"));

    // and without a network
    server.fail("GET", "", Fault::Close, usize::MAX);
    let mut offline =
        command(["logits", "--ids", &ids, "--output", &space.path("c"), "--model", "org/tiny", "--lora", "me/adapter"]);
    let ran = finish(offline.env("HF_HOME", space.path("hf")).env("HF_HUB_OFFLINE", "1").env_remove("HF_HUB_CACHE"));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

#[test]
fn a_chat_model_answers_by_its_id() {
    let (server, space) = (Server::start(), Space::new());
    let commit = publish(&server, "org/chat", &chat_model());
    server.commit("models/org/chat", &[("config.json", b"{}")]);
    let flags = ["--chat", "--prompt", "hello", "--max-tokens", "4", "--temperature", "0"];
    let base = chat_model();
    let by_path = succeed(&server, &space, [&["infer", "--model", &base], &flags[..]].concat());
    let by_id =
        succeed(&server, &space, [&["infer", "--model", "org/chat", "--revision", &commit], &flags[..]].concat());
    assert_eq!(by_path.stdout, by_id.stdout);
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_is_asked() {
    let (server, space) = (Server::start(), Space::new());
    let (here, data) = (model("llama"), quickstart("train.jsonl"));
    let train = |model: &str, more: &[&str]| {
        let args = [&["train", "--model", model, "--dataset", &data], more].concat();
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    for name in ["./nothing", "org/nothing.gguf", "nothing", "a/b/c", "/no/such/place"] {
        says(&refused(&server, &space, 1, train(name, &[])), &[name, "does not exist", "org/name"]);
    }
    says(&refused(&server, &space, 2, train(&here, &["--revision", "v1"])), &["--revision v1", "is a path"]);
    says(&refused(&server, &space, 2, train("org/a@v1", &["--revision", "v2"])), &["org/a@v1", "--revision v2"]);
    says(&refused(&server, &space, 2, ["download", "nothing"]), &["'nothing'", "org/name"]);
    says(&refused(&server, &space, 2, ["download", "a/b:x", "--include", "*"]), &["--include"]);
    says(&refused(&server, &space, 1, ["upload", &space.path("x"), "me/x"]), &["cannot read", "/x"]);
    assert_eq!(server.state().requests.len(), 0);
    server.commit("models/org/shut", &[("config.json", b"{}")]);
    server.fail("GET", "/revision/", error_code(403, "GatedRepo"), 1);
    let message = refused(&server, &space, 1, ["infer", "--model", "org/shut", "--prompt", "x"]);
    says(&message, &["org/shut is gated", "accept its licence", "HF_TOKEN"]);
}

#[test]
fn a_dataset_by_id_trains_and_is_evaluated_on_its_own_split() {
    let (server, space) = (Server::start(), Space::new());
    publish(&server, "org/tiny", &model("llama"));
    let rows = fs::read(rows()).unwrap();
    let files =
        [("data/train-00000.jsonl", rows.as_slice()), ("data/validation.jsonl", &rows), ("README.md", b"# Rows")];
    server.commit("datasets/org/rows", &files);
    let output = space.path("out");
    let base = ["train", "--model", "org/tiny", "--dataset", "org/rows", "--max-steps", "1", "--output", &output];
    let ran = succeed(&server, &space, base);
    says(&ran.stderr, &["16 rows to train on, 16 to evaluate on"]);
    assert!(metrics(&output)[0].get("eval_loss").is_some());
    let missing = ["data", "stats", "--model", "org/tiny", "--dataset", "org/none"];
    says(&refused(&server, &space, 1, missing), &["org/none"]);
}
