//! Ctrl-C, and readers that go away.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use crate::common::{Space, chat_model, column, command, logits, metrics, model, rows};

#[test]
#[cfg(unix)]
fn an_interrupted_run_writes_what_was_trained_and_says_where() {
    let space = Space::new();
    let output = space.path("out");
    let args = ["train", "--model", &model("llama"), "--dataset", &rows(), "--output", &output];
    let settings = ["--max-steps", "100000000", "--logging-steps", "1"];
    let mut child =
        command([&args[..], &settings].concat()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("step 3/") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "ended by itself");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let (mut told, mut result) = (String::new(), String::new());
    stderr.read_to_string(&mut told).unwrap();
    child.stdout.take().unwrap().read_to_string(&mut result).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{told}");
    assert!(told.contains("interrupted: finishing this step"), "{told}");
    assert!(told.contains(&format!("what was trained so far is in {output}")), "{told}");
    assert_eq!(result, format!("adapter: {output}\n"));

    let steps = *column(&metrics(&output), "step").last().unwrap();
    assert!(told.contains(&format!("{steps} of 100000000 steps")), "{told}");
    let base = model("llama");
    assert_ne!(logits(&space, &["--model", &base, "--lora", &output]), logits(&space, &["--model", &base]));
}

/// The writing end of a pipe that nobody reads.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_run_goes_on_when_nobody_reads_its_progress() {
    let space = Space::new();
    let output = space.path("out");
    let args = ["train", "--model", &model("llama"), "--dataset", &rows(), "--output", &output, "--logging-steps", "1"];
    let status = command(args).stdout(Stdio::null()).stderr(closed_pipe()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(fs::exists(format!("{output}/adapter_model.safetensors")).unwrap());
}

#[test]
fn a_reader_that_has_seen_enough_ends_the_command_without_a_word() {
    let config = format!("{}/config.json", model("llama"));
    let infer = ["infer", "--model", &chat_model(), "--prompt", "Hello", "--chat"].map(str::to_owned);
    let bench = ["bench", "train", "--model-config", &config, "--seq", "8", "--steps", "1"].map(str::to_owned);
    for args in [infer.to_vec(), bench.to_vec()] {
        let child = command(args).stdout(closed_pipe()).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!((told.as_str(), output.status.code()), ("", Some(0)));
    }
}
