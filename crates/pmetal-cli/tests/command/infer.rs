//! `pmetal infer`: the completion alone on stdout, the speed on stderr, and the same answer for the same seed.

use serde_json::{Value, json};

use crate::common::{Ran, Space, chat_model, fed, quickstart, succeed};

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

/// The object that `--json` prints.
fn json_of(more: &[&str]) -> Value {
    let ran = infer(&[&["--json"], more].concat());
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn what_is_piped_in_is_the_prompt() {
    let answer = infer(&["--chat"]).stdout;
    for text in [ASK.to_owned(), format!("{ASK}\n"), format!("{ASK}\r\n")] {
        assert_eq!(fed(["infer", "--model", &chat_model(), "--chat"], text.as_bytes()).stdout, answer);
    }
    let lines = fed(["infer", "--model", &chat_model(), "--json"], b"one\n\ntwo\n\n");
    let row: Value = serde_json::from_str(&lines.stdout).unwrap();
    assert_eq!(row["prompt"], "one\n\ntwo\n");
}

#[test]
fn json_has_the_completion_its_end_and_its_tokens() {
    let (plain, row) = (infer(&["--chat"]), json_of(&["--chat"]));
    let answer = plain.stdout.strip_suffix('\n').unwrap();
    let expected = json!({"prompt": ASK, "completion": answer, "finish_reason": "stop",
        "prompt_tokens": tokens(&plain, "prompt"), "completion_tokens": tokens(&plain, "decode")});
    assert_eq!(row, expected);
    let short = json_of(&["--chat", "--max-tokens", "2"]);
    assert_eq!((&short["finish_reason"], &short["completion_tokens"]), (&json!("length"), &json!(2)));
}

#[test]
fn a_full_context_ends_the_answer_and_says_so() {
    let space = Space::new();
    let whole = json_of(&["--chat"]);
    let room = whole["prompt_tokens"].as_u64().unwrap() + 3;
    let copy = space.edited(&chat_model(), "small", "config.json", |c| c["max_position_embeddings"] = json!(room));
    let ran = succeed(["infer", "--model", &copy, "--prompt", ASK, "--chat", "--json"]);
    let row: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&row["finish_reason"], &row["completion_tokens"]), (&json!("context"), &json!(3)));
    assert!(whole["completion"].as_str().unwrap().starts_with(row["completion"].as_str().unwrap()));
}

#[test]
fn an_answer_ends_before_a_stop_text() {
    let answer = infer(&["--chat"]).stdout;
    let whole = answer.trim_end();
    // cut within a word, so that the text begins and ends inside of tokens
    let at = whole.find("ts two orange ki").unwrap_or_else(|| panic!("{whole}"));
    let ran = infer(&["--chat", "--stop", "nothing", "--stop", "ts two orange ki"]);
    assert_eq!(ran.stdout, format!("{}\n", &whole[..at]));
    let row = json_of(&["--chat", "--stop", "ts two orange ki"]);
    assert_eq!((&row["completion"], &row["finish_reason"]), (&json!(whole[..at]), &json!("stop")));
    // what only begins like it is printed
    assert_eq!(infer(&["--chat", "--stop", &format!("{whole} And")]).stdout, answer);
}

#[test]
fn logprobs_name_every_token_and_the_likeliest_first() {
    let row = json_of(&["--chat", "--logprobs", "3"]);
    let entries = row["logprobs"]["content"].as_array().unwrap();
    assert_eq!(json!(entries.len()), row["completion_tokens"]);
    let text: String = entries.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(row["completion"], json!(text));
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // a greedy answer takes the first
        assert_eq!((&top[0]["id"], &top[0]["logprob"]), (&entry["id"], &entry["logprob"]));
        assert!(top.windows(2).all(|two| two[0]["logprob"].as_f64() >= two[1]["logprob"].as_f64()));
        let share: f64 = top.iter().map(|t| t["logprob"].as_f64().unwrap().exp()).sum();
        assert!(share > 0.0 && share < 1.0 + 1e-6, "{share}");
    }
    let hot = json_of(&["--chat", "--logprobs", "0", "--temperature", "0.01", "--repetition-penalty", "1"]);
    assert_eq!(hot["logprobs"]["content"][0]["logprob"], entries[0]["logprob"], "temperature is no part of them");
    assert_eq!(hot["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[test]
fn a_base_model_chats_in_chatml_and_stops_at_the_text_that_ends_a_turn() {
    let space = Space::new();
    let base = space.edited(&chat_model(), "base", "tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template");
    });
    let ran = succeed(["infer", "--model", &base, "--prompt", ASK, "--chat", "--max-tokens", "4"]);
    let note = "the model has no chat template: using chatml; --chat-template names another";
    assert_eq!(ran.stderr.lines().next(), Some(note));
    let plain = succeed(["infer", "--model", &base, "--prompt", ASK, "--max-tokens", "4"]);
    assert!(!plain.stderr.contains("chat template"), "{}", plain.stderr);
    let chosen =
        ["infer", "--model", &base, "--prompt", ASK, "--chat", "--chat-template", "chatml", "--max-tokens", "4"];
    assert_eq!((succeed(chosen).stdout, succeed(chosen).stderr.lines().count()), (ran.stdout, 1));
    // a template whose turns end in a text that is no token: what the model would say ends there
    let answer = infer(&["--chat"]).stdout;
    let word = answer.split_whitespace().nth(2).unwrap();
    let template = format!(
        "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}\
        {{% if m.role == 'assistant' %}}{word}{{% else %}}<|im_end|>{{% endif %}}\n{{% endfor %}}\
        {{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
    );
    let file = space.write("worded.jinja", template);
    let ended = infer(&["--chat", "--chat-template", &file]).stdout;
    assert_eq!(ended, format!("{}\n", &answer[..answer.find(word).unwrap()]));
}
