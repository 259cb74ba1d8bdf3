//! Looking at datasets, and training on files of every kind.

use std::fs;

use serde_json::{Value, json};

use crate::common::{Space, chat_model, metrics, quickstart, refused, rows, says, succeed};

const ROW: &str =
    r#"{"messages": [{"role": "user", "content": "Hi\tyou"}, {"role": "assistant", "content": "Hello."}]}"#;

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn a_preview_shows_what_is_trained_and_where_the_turn_ends() {
    let space = Space::new();
    let file = space.write("rows.jsonl", ROW);
    let ran = succeed(["data", "preview", "--model", &chat_model(), "--dataset", &file]);
    let shown = lines(&ran.stdout);
    assert!(
        shown[0].starts_with("row 0 (") && shown[0].contains("line 1): ") && shown[0].ends_with(" trained"),
        "{shown:?}"
    );
    assert!(shown.iter().all(|line| line.chars().count() <= 80 || line.starts_with("row")), "{shown:#?}");
    assert!(shown.contains(&"  <|im_start|>·user·⏎"), "{shown:#?}");
    let trained: Vec<_> = shown.iter().filter(|line| line.starts_with("+ ")).collect();
    assert!(trained.last().unwrap().contains("trained"), "{shown:#?}");
    assert!(shown.iter().any(|line| line.starts_with("+ ") && line.ends_with("<|im_end|>  <- end of turn, trained")));
    assert!(shown.iter().any(|line| line.starts_with("  ") && line.ends_with("<|im_end|>  <- end of turn")));
    assert!(ran.stdout.contains('→'), "a tab is seen");
    assert!(!ran.stdout.contains('\u{1b}'), "no colour in a pipe");
}

#[test]
fn a_preview_as_json_has_the_ids_that_are_trained() {
    let space = Space::new();
    let file = space.write("rows.jsonl", ROW);
    let base = ["--model", &chat_model(), "--dataset", &file];
    let ran = succeed([&["data", "preview", "--json"][..], &base].concat());
    let row: Value = serde_json::from_str(&ran.stdout).unwrap();
    let tokens = row["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(text, "<|im_start|>user\nHi\tyou<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n");
    let output = space.path("ids.jsonl");
    succeed([&["data", "convert", "--to", "tokens", "--output", &output][..], &base].concat());
    let written: Value = serde_json::from_str(&fs::read_to_string(&output).unwrap()).unwrap();
    let ids: Vec<&Value> = tokens.iter().map(|token| &token["id"]).collect();
    assert_eq!(written["input_ids"], json!(ids));
    let label = |token: &Value| if token["trained"] == true { token["id"].clone() } else { json!(-100) };
    assert_eq!(written["labels"], json!(tokens.iter().map(label).collect::<Vec<_>>()));
}

#[test]
fn tool_calls_are_seen_and_a_template_without_them_says_so() {
    let space = Space::new();
    let row = json!({"tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}], "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]},
        {"role": "tool", "content": "12"}, {"role": "assistant", "content": "Cool."}]});
    let file = space.write("tools.jsonl", row.to_string());
    let base = ["data", "preview", "--model", &chat_model(), "--dataset", &file];
    says(
        &refused(1, base),
        &["tools.jsonl:1:", "message 1 (from 0) has tool calls and no content", "--chat-template qwen-3"],
    );
    let ran = succeed([&base[..], &["--chat-template", "qwen-3", "--json"]].concat());
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    let trained = shown["tokens"].as_array().unwrap().iter().filter(|token| token["trained"] == true);
    let text: String = trained.map(|token| token["text"].as_str().unwrap()).collect();
    assert!(text.contains("<tool_call>") && text.contains("Bern") && text.contains("Cool."), "{text}");
    assert!(!text.contains("12"), "{text}");
}

#[test]
fn warnings_of_a_preview() {
    let space = Space::new();
    let silent = space.write("rows.jsonl", r#"{"messages": [{"role": "user", "content": "Hi"}]}"#);
    let ran = succeed(["data", "preview", "--model", &chat_model(), "--dataset", &silent]);
    says(&ran.stderr, &["1 of 1 rows have no trained token"]);
    let row = space.write("row.jsonl", ROW);
    let beyond = ["data", "preview", "--model", &chat_model(), "--dataset", &row, "--row", "7"];
    says(&refused(2, beyond), &["--row 7", "has 1 rows"]);
}

#[test]
fn stats_count_rows_tokens_and_duplicates() {
    let file = quickstart("train.jsonl");
    let twice = Space::new();
    let doubled = twice.write("twice.jsonl", fs::read_to_string(&file).unwrap().repeat(2));
    let ran =
        succeed(["data", "stats", "--model", &chat_model(), "--dataset", &doubled, "--max-seq-len", "40", "--json"]);
    let stats: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&stats["rows"], &stats["duplicates"], &stats["rows_left_out"]),
        (&json!(2000), &json!(1000), &json!(0))
    );
    let cut = &stats["cuts"].as_array().unwrap()[0];
    assert_eq!(cut["max_seq_len"], 40);
    assert!(cut["truncated"].as_u64().unwrap() > 0 && cut["lost_tokens"].as_u64() > cut["truncated"].as_u64());
    let ran = succeed(["data", "stats", "--model", &chat_model(), "--dataset", &file]);
    assert!(lines(&ran.stdout).iter().all(|line| line.chars().count() <= 80), "{}", ran.stdout);
    says(&ran.stdout, &["duplicates", "packs full", "█"]);
}

#[test]
fn rows_survive_every_format_and_file() {
    let space = Space::new();
    let start = space.write("rows.jsonl", fs::read_to_string(quickstart("heldout.jsonl")).unwrap());
    let mut last = start.clone();
    for (format, name) in [
        ("sharegpt", "a.json"),
        ("alpaca", "b.csv"),
        ("prompt-completion", "c.tsv.gz"),
        ("messages", "d.jsonl.zst"),
        ("messages", "e.csv"),
        ("messages", "f.jsonl"),
    ] {
        let next = space.path(name);
        let ran = succeed(["data", "convert", "--dataset", &last, "--to", format, "--output", &next]);
        assert_eq!(ran.stdout.trim_end(), format!("{next}: 100 rows"));
        last = next;
    }
    let rows = |path: &str| -> Vec<Value> {
        fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(rows(&last), rows(&start));
    let text = space.path("text.jsonl");
    says(
        &refused(1, ["data", "convert", "--dataset", &start, "--to", "text", "--output", &text]),
        &["rows.jsonl:1:", "name a model with --model"],
    );
    assert!(!fs::exists(&text).unwrap(), "nothing is left of a file that was not finished");
    succeed(["data", "convert", "--dataset", &start, "--to", "text", "--model", &chat_model(), "--output", &text]);
    assert!(rows(&text)[0]["text"].as_str().unwrap().starts_with("<|im_start|>user\n"));
    says(
        &refused(1, ["data", "convert", "--dataset", &start, "--to", "messages", "--output", &space.path("x.xlsx")]),
        &["x.xlsx", ".jsonl, .json, .csv or .tsv"],
    );
}

#[test]
fn training_reads_tables_folders_and_several_datasets() {
    let space = Space::new();
    let table = space.path("data/train.csv");
    fs::create_dir_all(space.path("data")).unwrap();
    succeed(["data", "convert", "--dataset", &quickstart("heldout.jsonl"), "--to", "alpaca", "--output", &table]);
    space.write("data/valid.jsonl", fs::read_to_string(quickstart("heldout.jsonl")).unwrap());
    let (folder, output) = (space.path("data"), space.path("out"));
    let base = ["train", "--model", &chat_model(), "--max-steps", "2", "--output", &output];
    let ran = succeed([&base[..], &["--dataset", &folder]].concat());
    says(&ran.stderr, &["100 rows to train on, 100 to evaluate on"]);
    assert!(metrics(&output)[0].get("eval_loss").is_some());

    let both = ["--dataset", &folder, "--dataset", &quickstart("train.jsonl"), "--dataset-weights", "2,0.1"];
    let ran = succeed([&base[..], &both, &["--eval-split", "10"]].concat());
    says(&ran.stderr, &["290 rows to train on, 10 to evaluate on"]);
    let message = refused(2, [&base[..], &["--dataset", &folder, "--dataset-weights", "1,2"]].concat());
    says(&message, &["--dataset-weights", "2 weights for 1 datasets"]);
}

#[test]
fn rows_of_ids_need_no_tokenizer_to_be_counted() {
    let model = crate::common::model("llama");
    let ran = succeed(["data", "stats", "--model", &model, "--dataset", &rows(), "--json"]);
    let stats: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&stats["rows"], &stats["tokens"]), (&json!(16), &json!(242)));
}
