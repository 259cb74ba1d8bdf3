//! Rows and templates that cannot be trained on.

use crate::common::{Space, chat_model, gguf, model, quickstart, refused, rows, says, succeed};

/// What `pmetal train` says about a dataset called `name` with these contents.
fn training(name: &str, contents: &str, more: &[&str]) -> String {
    let space = Space::new();
    let file = space.write(name, contents);
    let output = space.path("out");
    let message =
        refused(1, [&["train", "--model", &model("llama"), "--dataset", &file, "--output", &output], more].concat());
    says(&message, &[&file]);
    assert!(!std::fs::exists(output).unwrap(), "a run that cannot start makes no folder");
    message
}

#[test]
fn a_bad_row_is_named_by_file_line_and_reason() {
    let good = "{\"input_ids\": [1, 2, 3]}\n";
    let second = |row: &str| training("rows.jsonl", &format!("{good}{row}\n"), &[]);
    says(&second("{\"input_ids\":"), &["rows.jsonl:2: bad JSON", "a row is one line"]);
    says(&second("[1]"), &["rows.jsonl:2: expected a JSON object, found an array"]);
    says(&second("{\"ids\": [1]}"), &["rows.jsonl:2: no known format has the keys [ids]", "Alpaca (instruction"]);
    says(&second("{\"input_ids\": [1, -2]}"), &["rows.jsonl:2: 'input_ids' entry 1 is -2"]);
    says(&second("{\"input_ids\": [1, 2], \"labels\": [1]}"), &["rows.jsonl:2: 'labels' has 1 entries"]);
    says(
        &second("{\"messages\": [{\"role\": \"robot\", \"content\": \"\"}]}"),
        &["rows.jsonl:2:", "unknown role 'robot'"],
    );
    says(&second("{\"text\": \"hi\"}"), &["rows.jsonl:2: the model has no tokenizer", "tokenizer.json"]);

    let array = "[{\"input_ids\": [1, 2]},\n\n {\"ids\": [1]}]";
    says(&training("rows.json", array, &[]), &["rows.json:3: element 1: no known format"]);
    says(&training("rows.json", "[{\"input_ids\": [1, 2]}", &[]), &["rows.json:1: bad JSON: EOF"]);
}

#[test]
fn ids_outside_the_vocabulary_are_found_before_the_first_step() {
    let good = "{\"input_ids\": [1, 2, 95]}\n";
    let message = training("rows.jsonl", &format!("{good}{{\"input_ids\": [1, 2, 96]}}\n"), &[]);
    says(&message, &["rows.jsonl:2: 'input_ids' entry 2 is 96, the model knows the ids 0 to 95"]);
    let labels = "{\"input_ids\": [1, 2], \"labels\": [-100, 5000]}\n";
    says(&training("rows.jsonl", labels, &[]), &["rows.jsonl:1: 'labels' entry 1 is 5000"]);
}

#[test]
fn datasets_with_nothing_to_train_on() {
    says(&training("rows.jsonl", "", &[]), &["nothing to train on", "the file is empty"]);
    says(&training("rows.json", "[]", &[]), &["nothing to train on", "the file is empty"]);
    let masked = "{\"input_ids\": [1, 2], \"labels\": [-100, -100]}\n";
    says(&training("rows.jsonl", masked, &[]), &["nothing to train on in 1 rows", "line 1: no label but -100"]);
    let late = "{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, 3]}\n";
    says(&training("rows.jsonl", late, &["--max-seq-len", "2"]), &["line 1: 3 tokens", "behind the cut"]);
    says(&training("rows.csv", "text\n", &[]), &["nothing to train on", "the file is empty"]);
}

#[test]
fn datasets_that_are_not_there() {
    let space = Space::new();
    let (nowhere, output) = (space.path("nowhere.jsonl"), space.path("out"));
    let base = ["train", "--model", &model("llama"), "--output", &output];
    says(&refused(1, [&base[..], &["--dataset", &nowhere]].concat()), &[&nowhere]);
    says(&refused(1, [&base[..], &["--dataset", &rows(), "--eval-dataset", &nowhere]].concat()), &[&nowhere]);
}

#[test]
fn an_output_that_cannot_be_written() {
    let space = Space::new();
    let file = space.write("file", "");
    for output in [file.clone(), space.path("file/below")] {
        let message = refused(1, ["train", "--model", &model("llama"), "--dataset", &rows(), "--output", &output]);
        says(&message, &[&output]);
    }
    let ids = space.write("ids.json", "[[1]]");
    let folder = refused(1, ["logits", "--model", &model("llama"), "--ids", &ids, "--output", &model("llama")]);
    says(&folder, &[&model("llama"), "it is there and no file"]);
    says(
        &refused(1, ["logits", "--model", &model("llama"), "--ids", &ids, "--output", &space.path("file/x")]),
        &[&file],
    );
}

#[test]
fn templates_that_fail() {
    let space = Space::new();
    let saying = |name: &str, template: &str| {
        let file = space.write(name, template);
        let (chat, output) = (chat_model(), space.path("out"));
        let asked = refused(1, ["infer", "--model", &chat, "--prompt", "x", "--chat", "--chat-template", &file]);
        let train = ["train", "--model", &chat, "--dataset", &quickstart("train.jsonl"), "--output", &output];
        let trained = refused(1, [&train[..], &["--chat-template", &file]].concat());
        says(&asked, &[&file]);
        says(&trained, &[&file]);
        (asked, trained)
    };
    let raises = "{% for m in messages %}{{ raise_exception('two\nlines') }}{% endfor %}";
    let (asked, trained) = saying("raises.jinja", raises);
    says(&asked, &["refuses the conversation: two lines"]);
    says(&trained, &["train.jsonl:1: chat template", "refuses the conversation: two lines"]);
    let (asked, _) = saying("syntax.jinja", "{% for m in messages %}\n{{ m.content");
    says(&asked, &["line 2: syntax error"]);
    let (asked, trained) = saying("undefined.jinja", "{% for m in messages %}\n{{ m.one.two }}{% endfor %}");
    says(&asked, &["line 2: undefined value"]);
    says(&trained, &["train.jsonl:1:", "line 2: undefined value"]);
}

#[test]
fn a_gguf_file_without_a_tokenizer_trains_on_ids_and_says_what_text_needs() {
    let space = Space::new();
    let output = space.path("out");
    let base = ["train", "--model", &gguf("llama"), "--output", &output, "--max-steps", "1", "--dataset"];
    let text = space.write("text.jsonl", "{\"text\": \"hi\"}\n");
    says(&refused(1, [&base[..], &[&text]].concat()), &["text.jsonl:1: the model has no tokenizer"]);
    succeed([&base[..], &[&rows()]].concat());

    let around = space.path("around/model.gguf");
    space.write("around/model.gguf", std::fs::read(gguf("llama")).unwrap());
    succeed(["train", "--model", &space.path("around"), "--output", &output, "--max-steps", "1", "--dataset", &rows()]);
    says(&refused(1, ["infer", "--model", &space.path("around"), "--prompt", "x"]), &[&around, "has no tokenizer"]);
}
