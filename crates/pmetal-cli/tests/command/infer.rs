//! `pmetal infer`: the completion alone on stdout, the speed on stderr, and the same answer for the same seed.

use crate::common::{Ran, Space, chat_model, quickstart, succeed};

const ASK: &str = "Please pack two orange kites for Carla.";

fn infer(more: &[&str]) -> Ran {
    succeed([&["infer", "--model", &chat_model(), "--prompt", ASK], more].concat())
}

/// Tokens after the word `what` of the speed line.
fn tokens(ran: &Ran, what: &str) -> usize {
    let rest = ran.stderr.split_once(&format!("{what}: ")).unwrap().1;
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn stdout_holds_the_answer_and_stderr_the_speed() {
    let ran = infer(&["--chat"]);
    let answer = ran.stdout.strip_suffix('\n').unwrap();
    assert!(!answer.is_empty() && !answer.ends_with('\n'), "{answer:?}");
    assert!(!answer.contains("<|") && !answer.contains(ASK), "{answer:?}");
    let speed: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(speed.len(), 1, "{speed:?}");
    assert!(speed[0].starts_with("prompt: ") && speed[0].matches(" tok/s").count() == 2, "{speed:?}");
    assert!(tokens(&ran, "prompt") > 0 && tokens(&ran, "decode") > 0);
}

#[test]
fn the_end_of_the_turn_stops_it_and_is_not_printed() {
    let ran = infer(&["--chat", "--max-tokens", "400"]);
    assert!(tokens(&ran, "decode") < 400, "did not stop: {}", ran.stdout);
    assert!(!ran.stdout.contains("im_end") && !ran.stdout.contains("endoftext"), "{}", ran.stdout);
}

#[test]
fn a_chat_has_turns_around_the_prompt_and_a_completion_has_not() {
    let (chat, raw) = (infer(&["--chat"]), infer(&["--max-tokens", "8"]));
    assert!(tokens(&chat, "prompt") > tokens(&raw, "prompt"));
    assert_ne!(chat.stdout, raw.stdout);
    let system = infer(&["--chat", "--system", "Answer in JSON."]);
    assert!(tokens(&system, "prompt") > tokens(&chat, "prompt"));
}

#[test]
fn greedy_and_seeded_answers_repeat() {
    assert_eq!(infer(&["--chat"]).stdout, infer(&["--chat", "--seed", "9"]).stdout);
    let sampled = |seed: &str| infer(&["--max-tokens", "24", "--temperature", "3", "--seed", seed]).stdout;
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    let cold = infer(&["--chat", "--temperature", "5", "--top-k", "1"]).stdout;
    assert_eq!(cold, infer(&["--chat"]).stdout);
}

#[test]
fn no_more_tokens_than_asked_for() {
    assert_eq!(tokens(&infer(&["--chat", "--max-tokens", "3"]), "decode"), 3);
    let none = infer(&["--chat", "--max-new-tokens", "0"]);
    assert_eq!((none.stdout.as_str(), tokens(&none, "decode")), ("\n", 0));
}

#[test]
fn an_adapter_changes_the_answer_and_is_found_as_folder_or_file() {
    let space = Space::new();
    let (base, rows, output) = (chat_model(), quickstart("train.jsonl"), space.path("out"));
    let args = ["train", "--model", &base, "--dataset", &rows, "--output", &output, "--max-steps", "20"];
    succeed([&args[..], &["--learning-rate", "5e-3", "--batch-size", "8"]].concat());
    let tuned = infer(&["--chat", "--lora", &output]).stdout;
    assert_ne!(tuned, infer(&["--chat"]).stdout);
    assert_eq!(tuned, infer(&["--chat", "--lora", &format!("{output}/lora_weights.safetensors")]).stdout);
}

#[test]
fn reasoning_is_hidden_unless_asked_for() {
    let space = Space::new();
    // a template that opens the tag: what the model says is reasoning that never ends
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        <|im_start|>assistant\n<think>";
    let file = space.write("think.jinja", template);
    let hidden = infer(&["--chat", "--chat-template", &file, "--max-tokens", "8"]);
    assert_eq!(hidden.stdout, "\n");
    let shown = infer(&["--chat", "--chat-template", &file, "--max-tokens", "8", "--show-thinking"]);
    assert!(
        !shown.stdout.trim().is_empty() && tokens(&shown, "decode") == tokens(&hidden, "decode"),
        "{}",
        shown.stdout
    );
}
