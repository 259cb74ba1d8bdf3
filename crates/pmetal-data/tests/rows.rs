//! Rows of every format through a tokenizer made here, where every id can be counted by hand: one byte is one token.

use std::fs;

use pmetal_data::{
    CacheChoice, Dataset, DatasetOptions, Example, Source, Template, TemplateChoice, Tokenizer, TrainOn,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const BOS: u32 = 256;
const EOS: u32 = 257;
const END: u32 = 259;
const BOS_TEXT: &str = "<s>";

/// The characters that stand for bytes in byte-level BPE (GPT-2's table).
fn byte_character(byte: u32) -> char {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let code = if printable(byte) { byte } else { 256 + (0..byte).filter(|&b| !printable(b)).count() as u32 };
    char::from_u32(code).unwrap()
}

/// A model folder whose tokenizer has one token per byte, with bos before a plain text if `adds_bos`.
fn model(adds_bos: bool, special: &[&str], config: Value) -> TempDir {
    let vocab: Map<String, Value> = (0..256).map(|b| (byte_character(b).to_string(), b.into())).collect();
    let added = special.iter().enumerate().map(|(i, text)| {
        json!({"id": 256 + i, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    });
    let bos = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": BOS_TEXT, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS_TEXT: {"id": BOS_TEXT, "ids": [BOS], "tokens": [BOS_TEXT]}}});
    let tokenizer = json!({"version": "1.0", "added_tokens": added.collect::<Vec<_>>(), "normalizer": null,
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": if adds_bos { bos } else { Value::Null }, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn base_model(adds_bos: bool) -> TempDir {
    model(adds_bos, &["<s>", "</s>"], json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
}

fn load(folder: &TempDir, rows: &str, template: &str, train_on: &str, max_seq_len: usize) -> Result<Dataset, String> {
    let path = folder.path().join("rows.jsonl");
    fs::write(&path, rows).unwrap();
    let tokenizer = Tokenizer::find(folder.path()).unwrap();
    let template = Template::choose(&template.parse().unwrap(), tokenizer.as_ref()).unwrap();
    let train_on = train_on.parse().unwrap();
    let cache = CacheChoice::Temporary;
    let options = DatasetOptions { train_on, max_seq_len, cache, ..DatasetOptions::new(template, usize::MAX) };
    let source = Source::find(&path).unwrap();
    Dataset::load(&source.into(), tokenizer.as_ref(), &options, &mut ()).map_err(|e| e.to_string())
}

fn one(folder: &TempDir, row: Value, template: &str, train_on: &str) -> Example {
    load(folder, &row.to_string(), template, train_on, 0).unwrap().examples.get(0).unwrap()
}

/// The text of the ids, special ones by name.
fn text(ids: &[u32]) -> String {
    let bytes = ids.iter().flat_map(|&id| match id {
        BOS => b"<s>".to_vec(),
        EOS => b"</s>".to_vec(),
        id if id > 255 => format!("<{id}>").into_bytes(),
        byte => vec![byte as u8],
    });
    String::from_utf8(bytes.collect()).unwrap()
}

fn trained(example: &Example) -> String {
    let ids = example.input_ids.iter().zip(&example.labels).filter(|(_, label)| **label != -100);
    text(&ids.map(|(&id, _)| id).collect::<Vec<_>>())
}

#[test]
fn a_text_row_is_what_the_tokenizer_makes_of_it_and_eos() {
    for (adds_bos, expected) in [(true, "<s>héllo world</s>"), (false, "héllo world</s>")] {
        let example = one(&base_model(adds_bos), json!({"text": "héllo world"}), "auto", "assistant");
        assert_eq!(text(&example.input_ids), expected);
        assert_eq!(trained(&example), expected);
    }
}

#[test]
fn a_base_model_gets_alpacas_prompt_for_alpaca_rows() {
    let row = json!({"instruction": "Add.", "input": "1 and 2", "output": "3"});
    let example = one(&base_model(true), row, "auto", "assistant");
    let expected = "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a \
        response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3</s>";
    assert_eq!(text(&example.input_ids), expected);
    assert_eq!(trained(&example), "3</s>");
    let row = json!({"instruction": "Say hi.", "input": "", "output": "Hi.", "history": [["a", "b"]]});
    let example = one(&base_model(false), row.clone(), "auto", "assistant");
    let expected = "Below is an instruction that describes a task. Write a response that appropriately completes the \
        request.\n\n### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nSay hi.\n\n### Response:\nHi.</s>";
    assert_eq!(text(&example.input_ids), expected);
    assert_eq!(trained(&example), "b</s>Hi.</s>");
    assert_eq!(trained(&one(&base_model(false), row, "auto", "last")), "Hi.</s>");
}

#[test]
fn a_base_model_gets_chatml_for_conversations() {
    let row = json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"},
        {"from": "human", "value": "So"}, {"from": "gpt", "value": "No"}]});
    // The tokenizer has no such token: the marks are plain text, and eos teaches the model to stop.
    let plain = one(&base_model(true), row.clone(), "auto", "assistant");
    let expected = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n\
        <|im_start|>assistant\nNo<|im_end|>\n</s>";
    assert_eq!(text(&plain.input_ids), expected);
    assert_eq!(trained(&plain), "Yes<|im_end|>\nNo<|im_end|>\n</s>");
    let names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let special = model(false, &names, json!({"bos_token": "<s>", "eos_token": "</s>"}));
    let own = one(&special, row, "chatml", "assistant");
    assert_eq!(text(&own.input_ids).matches("<259>").count(), 4);
    assert_eq!(trained(&own), "Yes<259>No<259>");
    let tokenizer = Tokenizer::from_model_path(special.path()).unwrap();
    let template = Template::choose(&TemplateChoice::Named("chatml"), &tokenizer).unwrap();
    assert_eq!(template.end_of_turn(&tokenizer), Some(END));
}

#[test]
fn where_marks_stand_behind_an_answer_the_one_that_ends_text_is_trained_too() {
    let folder =
        model(false, &["<s>", "</s>", "<answer>", "</answer>"], json!({"bos_token": "<s>", "eos_token": "</s>"}));
    let path = folder.path().join("own.jinja");
    let answer =
        "{% if m.role == 'assistant' %}<answer>{{ m.content }}</answer></s>{% else %}{{ m.content }}</s>{% endif %}";
    let prompt = "{% if add_generation_prompt %}<answer>{% endif %}";
    fs::write(&path, format!("{{% for m in messages %}}{answer}{{% endfor %}}{prompt}")).unwrap();
    let row = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So"}, {"role": "assistant", "content": "No"}]});
    let example = one(&folder, row, path.to_str().unwrap(), "assistant");
    assert_eq!(trained(&example), "Yes<259></s>No<259></s>");
}

#[test]
fn an_end_of_turn_outside_the_generation_tags_is_trained_all_the_same() {
    let folder = base_model(false);
    let path = folder.path().join("own.jinja");
    let answer = "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}";
    fs::write(&path, format!("{{% for m in messages %}}{{{{ m.role[0] }}}}:{answer}{{% endfor %}}")).unwrap();
    let turn = |role, text| json!({"role": role, "content": text});
    let row = json!({"messages": [turn("user", "Hi"), turn("assistant", "Yo"), turn("assistant", "So")]});
    let example = one(&folder, row, path.to_str().unwrap(), "last");
    assert_eq!(text(&example.input_ids), "u:Hi</s>a:Yo</s>a:So</s>");
    assert_eq!(trained(&example), "So</s>");
}

#[test]
fn all_trains_all_and_labels_are_taken_as_they_are() {
    let row = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]});
    let example = one(&base_model(false), row, "chatml", "all");
    assert!(example.labels.iter().zip(&example.input_ids).all(|(&label, &id)| label == i64::from(id)));
    let row = json!({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 9]});
    let example = one(&base_model(false), row, "auto", "all");
    assert_eq!((example.input_ids, example.labels), (vec![5, 6, 7, 8], vec![-100, -100, 7, 9]));
}

#[test]
fn a_model_without_tokenizer_takes_ids_alone() {
    let folder = tempfile::tempdir().unwrap();
    let row = json!({"input_ids": [1, 2, 3]});
    assert_eq!(one(&folder, row, "auto", "assistant").labels, [1, 2, 3]);
    let message = load(&folder, "{\"text\": \"a\"}", "auto", "assistant", 0).unwrap_err();
    assert!(message.ends_with("rows.jsonl:1: the model has no tokenizer, so rows need 'input_ids'; put its tokenizer.json into its folder to train on text"), "{message}");
    let message = Tokenizer::from_model_path(folder.path()).unwrap_err().to_string();
    assert!(message.contains("has no tokenizer: a folder needs the model's tokenizer.json"), "{message}");
}

#[test]
fn what_became_of_the_rows_is_reported() {
    let rows = "{\"input_ids\": [1, 2, 3, 4]}\n{\"input_ids\": [1, 2, 3], \"labels\": [-100, -100, 3]}\n{\"input_ids\": [1]}\n";
    let dataset = load(&base_model(false), rows, "auto", "assistant", 2).unwrap();
    let report = &dataset.report;
    assert_eq!(
        (report.rows, report.truncated, report.tokens, report.supervised_tokens, report.longest),
        (3, 1, 2, 1, 2)
    );
    assert_eq!(
        report.to_string(),
        "3 rows, 2 tokens, 1 of them trained, the longest row has 2; 1 rows cut to length; 2 rows left out (the first, line 3: \
         fewer than two tokens)"
    );
    let message = load(&base_model(false), "{\"input_ids\": [1]}\n", "auto", "assistant", 2).unwrap_err();
    assert!(message.ends_with("nothing to train on in 1 rows: line 1: fewer than two tokens"), "{message}");
    let row = json!({"messages": [{"role": "user", "content": "Hi"}]}).to_string();
    let message = load(&base_model(false), &row, "auto", "assistant", 0).unwrap_err();
    assert!(
        message.ends_with("nothing to train on in 1 rows: line 1: the assistant says nothing that is trained"),
        "{message}"
    );
}

#[test]
fn a_failing_template_names_row_line_and_reason() {
    let folder = base_model(false);
    let path = folder.path().join("own.jinja");
    let row =
        json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}).to_string();
    let failure = |source: &str| {
        fs::write(&path, source).unwrap();
        load(&folder, &format!("\n{row}"), path.to_str().unwrap(), "assistant", 0).unwrap_err()
    };
    let message = failure("{{ raise_exception('no ' + messages[0].role) }}");
    assert!(
        message.contains("rows.jsonl:2: chat template") && message.ends_with("refuses the conversation: no user"),
        "{message}"
    );
    let message = failure("a\n{{ messages[7].role.x }}");
    assert!(message.contains("own.jinja, line 2: undefined value"), "{message}");
    let message = failure("{{ 'nothing of it' }}");
    assert!(message.contains("what the assistant says in message 1"), "{message}");
}

#[test]
fn streams_never_cut_a_character() {
    let tokenizer = Tokenizer::from_model_path(base_model(true).path()).unwrap();
    let ids = tokenizer.encode("aé👋🏽 b", true).unwrap();
    assert_eq!(ids.len(), 14);
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    let expected = ["", "a", "", "é", "", "", "", "👋", "", "", "", "🏽", " ", "b"];
    assert_eq!(pieces, expected);
    assert_eq!(stream.finish().unwrap(), "");
    let mut stream = tokenizer.stream();
    // Half a character at the end, and a byte that begins none.
    assert_eq!(stream.push(0xc3).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 77,
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}d"}]});
    let folder = model(true, &special, config);
    fs::write(folder.path().join("generation_config.json"), "{\"eos_token_id\": [259, 257]}").unwrap();
    let tokenizer = Tokenizer::from_model_path(folder.path()).unwrap();
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    let again = Tokenizer::from_model_path(saved.path()).unwrap();
    assert_eq!(again.encode("a <|im_end|> b", true).unwrap(), tokenizer.encode("a <|im_end|> b", true).unwrap());
    assert_eq!((again.eos_id(), again.vocab_size()), (Some(EOS), 260));
    let template = Template::choose(&TemplateChoice::Auto, &again).unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "<s>d");
    let config: Value = serde_json::from_slice(&fs::read(saved.path().join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(config["model_max_length"], 77);
}

#[test]
fn flags_are_read() {
    assert_eq!("last".parse::<TrainOn>().unwrap(), TrainOn::Last);
    assert!("every".parse::<TrainOn>().unwrap_err().to_string().contains("assistant, last or all"));
    assert_eq!("llama-3".parse::<TemplateChoice>().unwrap(), TemplateChoice::Named("llama-3"));
    assert_eq!("Gemma3".parse::<TemplateChoice>().unwrap(), TemplateChoice::Named("gemma"));
    let message = "none".parse::<TemplateChoice>().unwrap_err().to_string();
    assert_eq!(
        message,
        "no chat template 'none': expected auto, chatml, llama-3, llama-2, gemma, mistral, phi-3, phi-4, qwen-2.5, qwen-3, \
         deepseek-r1, zephyr, vicuna, alpaca or a file"
    );
}
