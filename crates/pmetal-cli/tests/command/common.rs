//! Running the binary, and the files it is run on.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    io::{Seek, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use serde_json::Value;

/// What a user waits at most for an answer of these small models, on a slow machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a run of the command left.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The command, not yet started.
pub fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pmetal"));
    // tokenized rows are kept with the tests, not in the cache of who runs them
    command.args(args).stdin(Stdio::null()).env("PMETAL_CACHE", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// Runs the command with something on its stdin.
pub fn fed<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, stdin: &[u8]) -> Ran {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(stdin).unwrap();
    file.rewind().unwrap();
    finish(command(args).stdin(file))
}

/// Runs the command to its end.
pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    finish(&mut command(args))
}

/// Runs a command that was set up to its end.
pub fn finish(command: &mut Command) -> Ran {
    let started = Instant::now();
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(started.elapsed() < PATIENCE, "took {:?}: {stderr}", started.elapsed());
    Ran { code: output.status.code(), stdout, stderr }
}

/// Runs what should work.
pub fn succeed<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let ran = run(args);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran
}

/// Runs what should be refused with exit code `code`: the one line that says why, behind `error: `.
pub fn refused<S: AsRef<OsStr>>(code: i32, args: impl IntoIterator<Item = S>) -> String {
    let ran = run(args);
    assert_eq!(ran.code, Some(code), "{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.stdout, "", "results of a run that failed");
    assert!(!ran.stderr.contains("panicked") && !ran.stderr.contains("stack backtrace"), "{}", ran.stderr);
    let last = ran.stderr.lines().last().unwrap_or_default();
    let Some(message) = last.strip_prefix("error: ") else { panic!("no error in the last line of:\n{}", ran.stderr) };
    assert_eq!(ran.stderr.lines().filter(|line| line.starts_with("error:")).count(), 1, "{}", ran.stderr);
    assert!(message.chars().count() < 700 && !message.contains(char::is_control), "{message}");
    message.to_owned()
}

/// What `pmetal logits` says about a model that it must refuse.
pub fn told(space: &Space, path: &str) -> String {
    told_about(space, path, &[])
}

/// The same with further flags: a line or two, and nothing written.
pub fn told_about(space: &Space, path: &str, more: &[&str]) -> String {
    let (ids, output) = (space.write("ids.json", "[[1, 2, 3]]"), space.path("out.safetensors"));
    let message = refused(1, [&["logits", "--model", path, "--ids", &ids, "--output", &output], more].concat());
    assert!(!fs::exists(output).unwrap(), "something was written");
    message
}

/// Asserts that a message has every part.
#[track_caller]
pub fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// A folder of this test alone.
pub struct Space {
    folder: tempfile::TempDir,
}

impl Space {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// A path in the folder, where there may be nothing yet.
    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }

    /// A copy of the files of a folder, for the test to break.
    pub fn copy(&self, from: &str, name: &str) -> String {
        let to = PathBuf::from(self.path(name));
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        }
        self.path(name)
    }

    /// A copy of a folder with one of its JSON files changed.
    pub fn edited(&self, from: &str, name: &str, file: &str, change: impl FnOnce(&mut Value)) -> String {
        let copy = self.copy(from, name);
        let path = Path::new(&copy).join(file);
        let mut json = read_json(&path);
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
        copy
    }
}

/// A path from the root of the repository.
fn repository(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path).canonicalize().unwrap();
    path.to_str().unwrap().to_owned()
}

/// A tiny checkpoint made with transformers, without a tokenizer; 96 ids.
pub fn model(name: &str) -> String {
    repository(&format!("crates/pmetal-models/tests/fixtures/{name}"))
}

/// The same as a GGUF file, also without a tokenizer.
pub fn gguf(name: &str) -> String {
    repository(&format!("crates/pmetal-gguf/tests/fixtures/{name}.gguf"))
}

/// 16 pre-tokenized rows of ids below 96, 242 tokens.
pub fn rows() -> String {
    repository("crates/pmetal-trainer/tests/fixtures/rows.jsonl")
}

/// The chat model of the quickstart: tokenizer, template, and it knows how to stop.
pub fn chat_model() -> String {
    repository("assets/quickstart/base")
}

/// A file of the quickstart.
pub fn quickstart(name: &str) -> String {
    repository(&format!("assets/quickstart/{name}"))
}

pub fn read_json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Tensors of a file as bits, so that equal is equal.
pub fn tensors(path: impl AsRef<Path>) -> HashMap<String, Vec<u32>> {
    let bits = |t: &Tensor| -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    tensors.iter().map(|(name, tensor)| (name.clone(), bits(tensor))).collect()
}

/// What `pmetal logits` writes for two short rows, as bits.
pub fn logits(space: &Space, more: &[&str]) -> HashMap<String, Vec<u32>> {
    let ids = space.write("ids.json", "[[5, 17, 42, 8, 90], [3, 60]]");
    let output = space.path("logits.safetensors");
    succeed([&["logits", "--dtype", "f32", "--ids", &ids, "--output", &output], more].concat());
    tensors(output)
}

/// The rows of `metrics.jsonl` in a run's folder.
pub fn metrics(output: &str) -> Vec<Value> {
    let text = fs::read_to_string(Path::new(output).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A column of the rows of steps.
pub fn column(rows: &[Value], key: &str) -> Vec<f64> {
    rows.iter().filter_map(|row| row.get(key)?.as_f64()).collect()
}

/// Asserts that numbers agree within a relative tolerance.
#[track_caller]
pub fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= tolerance * e.abs(), "{found:?}\n{expected:?}");
    }
}
