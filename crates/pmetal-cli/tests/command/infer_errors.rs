//! What `pmetal infer` refuses, before it loads a model.

use std::fs;

use serde_json::json;

use crate::common::{Space, chat_model, fed, model, refused, run, says};

/// What is said about flags, in one line.
fn usage(more: &[&str]) -> String {
    refused(2, [&["infer", "--model", &chat_model()], more].concat())
}

/// What is said about a file of prompts.
fn file(name: &str, contents: impl AsRef<[u8]>, more: &[&str]) -> String {
    let space = Space::new();
    let (prompts, output) = (space.write(name, contents), space.path("answers.jsonl"));
    let args = ["infer", "--model", &chat_model(), "--prompt-file", &prompts, "--output", &output];
    let message = refused(1, [&args[..], more].concat());
    assert!(!fs::exists(output).unwrap(), "a file for no answer: {message}");
    message
}

#[test]
fn prompts_that_are_empty() {
    says(&usage(&["--prompt", ""]), &["--prompt: is empty"]);
    says(&usage(&["--prompt", " \n", "--chat"]), &["--prompt: is empty"]);
    // nothing on stdin
    says(&usage(&["--chat"]), &["stdin: is empty"]);
    let ran = fed(["infer", "--model", &chat_model()], b"\xff\xfe");
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(2), "error: stdin: is not UTF-8 text\n"));
    says(&file("x.txt", "\n\n", &[]), &["x.txt: has no prompt"]);
    says(&file("x.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"\"}", &["--chat"]), &["x.jsonl:2: ", "is empty"]);
}

#[test]
fn settings_outside_their_range() {
    for (flag, expected) in [
        ("--temperature=-1", "a number from 0 on"),
        ("--temperature=nan", "a number from 0 on"),
        ("--top-p=0", "above 0 and at most 1"),
        ("--min-p=3", "from 0 to 1"),
        ("--repetition-penalty=0", "above 0"),
    ] {
        let name = flag.split('=').next().unwrap();
        says(&usage(&["--prompt", "x", flag]), &[&format!("{name}: is "), &format!("expected {expected}")]);
    }
    says(&usage(&["--prompt", "x", "--stop", ""]), &["--stop: is empty"]);
    let ran = run(["infer", "--model", &chat_model(), "--prompt", "x", "--top-k", "5", "--max-tokens", "1"]);
    says(&ran.stderr, &["--top-k chooses nothing at temperature 0"]);
}

#[test]
fn flags_that_would_do_nothing() {
    says(&usage(&["--prompt", "x", "--system", "y"]), &["--system: ", "add --chat"]);
    says(&usage(&["--prompt", "x", "--chat-template", "chatml"]), &["--chat-template: ", "add --chat"]);
    says(&usage(&["--prompt", "x", "--logprobs", "3"]), &["--logprobs: add --json"]);
    says(&usage(&["--prompt", "x", "--output", "y"]), &["--output: ", "--prompt-file"]);
    for (flags, named) in [
        (&["--prompt", "x", "--prompt-file", "y"][..], "--prompt-file"),
        (&["--prompt-file", "x", "--json"], "--json"),
        (&["--prompt", "x", "--json", "--show-thinking"], "--show-thinking"),
    ] {
        let ran = run([&["infer", "--model", &chat_model()], flags].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", ran.stderr);
        says(&ran.stderr, &[named]);
    }
    let space = Space::new();
    let ids = space.write("ids.json", "[[1]]");
    let adapter = model("llama/adapter");
    let args = ["logits", "--model", &model("llama"), "--ids", &ids, "--output", &ids];
    says(&refused(2, [&args[..], &["--lora", &adapter, "--lora", &adapter]].concat()), &["--lora: takes one adapter"]);
}

#[test]
fn files_of_prompts_that_are_broken() {
    says(&file("x.jsonl", "{\"prompt\": \"a\"}\n\n{\"prompt\": ", &[]), &["x.jsonl:3: bad JSON", "column"]);
    says(&file("x.jsonl", "{\"text\": \"a\"}", &[]), &["x.jsonl:1: has the keys [text], expected prompt"]);
    let answered = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    says(&file("x.jsonl", answered.to_string(), &[]), &["x.jsonl:1: the last turn is by 'assistant', expected user"]);
    let long = format!("a\n{}", "hello ".repeat(2000));
    says(&file("x.txt", long, &[]), &["x.txt:2: the prompt has ", "the model's context 512: shorten it by "]);
    let template = "{{ raise_exception('no such role') }}";
    let space = Space::new();
    let refusing = space.write("refusing.jinja", template);
    says(&file("x.txt", "a", &["--chat", "--chat-template", &refusing]), &["x.txt:1: chat template", "no such role"]);
    let nowhere = space.path("nowhere.jsonl");
    says(&refused(1, ["infer", "--model", &chat_model(), "--prompt-file", &nowhere]), &[&nowhere]);
    let prompts = space.write("prompts.txt", "a");
    let nowhere = space.path("no/such/folder/out.jsonl");
    let args = ["infer", "--model", &chat_model(), "--prompt-file", &prompts, "--output", &nowhere];
    says(&refused(1, args), &["cannot write", &nowhere]);
}
