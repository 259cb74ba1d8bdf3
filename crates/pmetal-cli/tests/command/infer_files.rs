//! `pmetal infer --prompt-file`: many prompts, several adapters, and what is left when it is stopped.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::common::{Ran, Space, chat_model, command, quickstart, succeed};

const ASKED: [&str; 3] =
    ["Please pack three red kites for Mara.", "Quinn wants to buy 7 black scarves today.", "Say: né €"];

fn infer(more: &[&str]) -> Ran {
    succeed([&["infer", "--model", &chat_model(), "--max-tokens", "24"], more].concat())
}

fn rows(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What each prompt gets when it is asked alone.
fn alone(more: &[&str]) -> Vec<Value> {
    ASKED.iter().map(|ask| rows(&infer(&[&["--prompt", ask, "--json"], more].concat()).stdout).remove(0)).collect()
}

#[test]
fn each_row_keeps_what_it_had_and_gets_the_answer_it_would_get_alone() {
    let space = Space::new();
    let lines: Vec<String> =
        ASKED.iter().enumerate().map(|(i, ask)| json!({"id": i, "prompt": ask, "gold": [1]}).to_string()).collect();
    let (prompts, output) = (space.write("prompts.jsonl", lines.join("\n")), space.path("answers.jsonl"));
    space.write("answers.jsonl", "what was there before\n".repeat(200));
    let ran = infer(&["--prompt-file", &prompts, "--output", &output, "--chat", "--logprobs", "1"]);
    assert_eq!(ran.stdout, "");
    let said = ran.stderr.lines().last().unwrap();
    assert!(said.starts_with(&format!("3 answers in {output}: ")) && said.ends_with(" tok/s"), "{}", ran.stderr);
    let mut expected = alone(&["--chat", "--logprobs", "1"]);
    for (i, row) in expected.iter_mut().enumerate() {
        (row["id"], row["gold"]) = (json!(i), json!([1]));
    }
    assert_eq!(rows(&fs::read_to_string(&output).unwrap()), expected);
    let keys: Vec<String> =
        rows(&fs::read_to_string(&output).unwrap())[0].as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys[..4], ["id", "prompt", "gold", "completion"]);
}

#[test]
fn plain_lines_and_conversations_go_to_stdout_in_order() {
    let space = Space::new();
    let text = space.write("prompts.txt", ASKED.join("\r\n\r\n"));
    assert_eq!(rows(&infer(&["--prompt-file", &text]).stdout), alone(&[]));
    // conversations need no --chat; the system turn goes before those without one
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let with = json!({"messages": [turn("system", "Be brief."), turn("user", ASKED[0])]});
    let without = json!([{"messages": [turn("user", ASKED[0])]}, with]);
    let file = space.write("prompts.json", without.to_string());
    let got = rows(&infer(&["--prompt-file", &file, "--system", "Be brief."]).stdout);
    let expected = &alone(&["--chat", "--system", "Be brief."])[0];
    for row in &got {
        assert_eq!((&row["completion"], &row["prompt_tokens"]), (&expected["completion"], &expected["prompt_tokens"]));
    }
    assert_eq!((got.len(), &got[1]["messages"]), (2, &with["messages"]));
}

#[test]
fn several_adapters_take_turns_and_leave_no_trace() {
    let space = Space::new();
    let [first, second] = ["first", "second"].map(|name| space.path(name));
    let (base, data) = (chat_model(), quickstart("train.jsonl"));
    let train = ["train", "--model", &base, "--dataset", &data, "--learning-rate", "5e-3", "--batch-size", "8"];
    succeed([&train[..], &["--max-steps", "20", "--output", &first]].concat());
    let few = ["--max-steps", "4", "--lora-target-modules", "q_proj", "--seed", "5", "--output", &second];
    succeed([&train[..], &few].concat());
    let prompts = space.write("prompts.txt", ASKED.join("\n"));
    let of = |adapters: &[&str]| {
        let flags: Vec<&str> = adapters.iter().flat_map(|adapter| ["--lora", adapter]).collect();
        rows(&infer(&[&["--prompt-file", &prompts, "--chat"], flags.as_slice()].concat()).stdout)
    };
    let (one, other) = (of(&[&first]), of(&[&second]));
    assert!(one.iter().all(|row| row["adapter"] == json!(first)));
    assert_ne!(one[0]["completion"], other[0]["completion"]);
    assert_eq!(of(&[&first, &second]), [one.as_slice(), other.as_slice()].concat());
    assert_eq!(of(&[&second, &first]), [other.as_slice(), one.as_slice()].concat());
    let both = infer(&["--prompt", ASKED[0], "--chat", "--lora", &first, "--lora", &second]).stdout;
    let text = |row: &Value| row["completion"].as_str().unwrap().to_owned();
    assert_eq!(both, format!("[{first}]\n{}\n[{second}]\n{}\n", text(&one[0]), text(&other[0])));
    let objects = rows(&infer(&["--prompt", ASKED[0], "--chat", "--json", "--lora", &first, "--lora", &second]).stdout);
    assert_eq!(objects, [one[0].clone(), other[0].clone()]);
}

#[test]
#[cfg(unix)]
fn what_is_answered_when_it_is_interrupted_is_in_the_file() {
    let space = Space::new();
    let prompts = space.write("prompts.txt", format!("{}\n", ASKED[0]).repeat(100_000));
    let output = space.path("answers.jsonl");
    let args = ["infer", "--model", &chat_model(), "--chat", "--prompt-file", &prompts, "--output", &output];
    let child = command(args).stderr(Stdio::piped()).spawn().unwrap();
    while fs::read_to_string(&output).unwrap_or_default().lines().count() < 3 {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let told = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(130), "{told}");
    let text = fs::read_to_string(&output).unwrap();
    assert!(text.ends_with('\n'));
    let rows = rows(&text);
    assert!(rows.iter().rev().skip(1).all(|row| row["completion"] == rows[0]["completion"]));
    let finish: Vec<&str> = rows.iter().map(|row| row["finish_reason"].as_str().unwrap()).collect();
    let (last, before) = finish.split_last().unwrap();
    assert!(before.iter().all(|&reason| reason == "stop") && *last == "interrupted", "{finish:?}");
    assert!(told.contains(&format!("interrupted: {} of 100000 answers are written", rows.len())), "{told}");
}
