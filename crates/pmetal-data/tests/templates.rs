//! Rendered text, ids and masks against `transformers`, for the templates in `fixtures/templates` (made by
//! `scripts/make-template-fixtures.py`), or those in the folder that `PMETAL_TEMPLATE_FIXTURES` names.

use std::{
    fs,
    path::{Path, PathBuf},
};

use pmetal_data::{
    CacheChoice, Dataset, DatasetOptions, Example, Message, Source, Template, TemplateChoice, Tokenizer, TrainOn,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const EOS: u32 = 1;

fn fixtures() -> PathBuf {
    match std::env::var_os("PMETAL_TEMPLATE_FIXTURES") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates"),
    }
}

fn expected() -> Value {
    serde_json::from_slice(&fs::read(fixtures().join("expected.json")).unwrap()).unwrap()
}

/// A model folder with this template and the tokenizer of the fixtures.
struct Model(TempDir);

impl Model {
    fn new(template: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(fixtures().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        if let Some(template) = template {
            fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        }
        Self(folder)
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::from_model_path(self.0.path()).unwrap()
    }

    fn encode(&self, row: &Value, train_on: TrainOn) -> Result<Example, String> {
        let path = self.0.path().join("rows.jsonl");
        fs::write(&path, row.to_string()).unwrap();
        let tokenizer = self.tokenizer();
        let template = Template::choose(&TemplateChoice::Auto, &tokenizer).unwrap();
        let options =
            DatasetOptions { train_on, cache: CacheChoice::Temporary, ..DatasetOptions::new(template, usize::MAX) };
        let source = Source::find(&path).unwrap();
        let dataset = Dataset::load(&source.into(), &tokenizer, &options, &mut ()).map_err(|e| e.to_string())?;
        Ok(dataset.examples.get(0).unwrap())
    }
}

fn trained(example: &Example) -> Vec<bool> {
    example.labels.iter().zip(&example.input_ids).map(|(&label, &id)| label == i64::from(id)).collect()
}

/// The last stretch of trained tokens alone, which an end of text before its own parts from another.
fn last_run(example: &Example) -> Vec<bool> {
    let mask = trained(example);
    let end = mask.iter().rposition(|&m| m).map_or(0, |last| last + 1);
    let parts = |at: usize| !mask[at] || (at + 1 < end && example.input_ids[at] == EOS);
    let start = (0..end).rev().find(|&at| parts(at)).map_or(0, |before| before + 1);
    (0..mask.len()).map(|at| (start..end).contains(&at)).collect()
}

/// The template with its generation tags taken out, whitespace control and all.
fn without_tags(template: &str) -> String {
    let mut out = template.to_string();
    for name in ["generation", "endgeneration"] {
        for (left, right) in [("", ""), ("-", ""), ("", "-"), ("-", "-")] {
            out = out.replace(
                &format!("{{%{left} {name} {right}%}}"),
                &format!("{{%{left} if true {right}%}}{{% endif %}}"),
            );
        }
    }
    out
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Calls `check` with the name, the template, the row and what is expected of it.
fn each_case(mut check: impl FnMut(&str, &str, &Value, &Value)) {
    let expected = expected();
    for (name, fixture) in expected["templates"].as_object().unwrap() {
        let template = fs::read_to_string(fixtures().join(format!("{name}.jinja"))).unwrap();
        for (case, expected_of) in fixture["cases"].as_object().unwrap() {
            check(&format!("{name}: {case}"), &template, &expected["conversations"][case], expected_of);
        }
    }
}

#[test]
fn ids_are_those_of_transformers() {
    let mut failures = Vec::new();
    each_case(|name, template, row, expected| {
        // Where Python fails over a mistake in the template, what we make of it is free.
        if expected.get("fails").is_some() {
            return;
        }
        let got = Model::new(Some(template)).encode(row, TrainOn::All);
        match (got, expected["error"].as_str()) {
            (Err(message), Some(theirs)) if message.contains(theirs) || !theirs.contains("raise") => {}
            (Ok(example), None) => {
                let mut theirs = ids(&expected["ids"]);
                // An answer that ends in plain text is followed by eos, which transformers would not add.
                if example.input_ids.len() == theirs.len() + 1 {
                    theirs.push(EOS);
                }
                if example.input_ids != theirs {
                    failures.push(format!("{name}: other ids"));
                }
            }
            (got, theirs) => failures.push(format!("{name}: {got:.0?} instead of {theirs:?}")),
        }
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn masks_are_those_of_generation_tags_with_and_without_the_tags() {
    let mut failures = Vec::new();
    each_case(|name, template, row, expected| {
        let Some(mask) = expected["mask"].as_array() else { return };
        // A template that does not write calls leaves an empty turn of them, where there is nothing to learn.
        let calls = row["messages"].as_array().unwrap().iter().any(|message| message.get("tool_calls").is_some());
        if calls && !expected["text"].as_str().unwrap().contains("weather") {
            return;
        }
        let mask: Vec<bool> = mask.iter().map(|m| m == 1).collect();
        for (kind, template) in [("tagged", template.to_string()), ("plain", without_tags(template))] {
            let example = match Model::new(Some(&template)).encode(row, TrainOn::Assistant) {
                Ok(example) => example,
                Err(_) if !mask.contains(&true) => continue,
                Err(message) => {
                    failures.push(format!("{name} ({kind}): {message}"));
                    continue;
                }
            };
            let mut mask = mask.clone();
            if example.input_ids.len() > mask.len() {
                // The eos that was added is trained, and the white space before it.
                let spoken = mask.iter().rposition(|&m| m).map_or(0, |last| last + 1);
                mask.truncate(spoken);
                mask.resize(example.input_ids.len(), true);
            }
            let last = Model::new(Some(&template)).encode(row, TrainOn::Last).unwrap();
            if trained(&last) != last_run(&example) {
                failures.push(format!("{name} ({kind}): the last turn alone"));
            }
            let got = trained(&example);
            if got != mask {
                let side = |mask: &[bool]| mask.iter().map(|&m| if m { '#' } else { '.' }).collect::<String>();
                let text = expected["text"].as_str().unwrap();
                failures.push(format!("{name} ({kind}): {text:?}\n  {}\n  {}", side(&got), side(&mask)));
            }
        }
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn prompts_are_those_of_transformers() {
    let expected = expected();
    for (name, fixture) in expected["templates"].as_object().unwrap() {
        let Some(prompt) = fixture["prompt"].as_str() else { continue };
        let source = fs::read_to_string(fixtures().join(format!("{name}.jinja"))).unwrap();
        let template = Template::choose(&TemplateChoice::Auto, &Model::new(Some(&source)).tokenizer()).unwrap();
        assert_eq!(template.render(&[Message::new("user", "What is 2 + 2?")], true).unwrap(), prompt, "{name}");
    }
}

/// `named.json` holds what public templates make of plain conversations (`make-template-fixtures.py --named`).
#[test]
fn built_in_templates_write_what_public_ones_do() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates/named.json");
    let named: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let tokenizer = Model::new(None).tokenizer();
    for (name, cases) in named.as_object().unwrap() {
        let choice: TemplateChoice = name.parse().unwrap();
        let template = Template::choose(&choice, &tokenizer).unwrap();
        for case in cases.as_array().unwrap() {
            let turns = case["messages"].as_array().unwrap().iter();
            let messages: Vec<Message> =
                turns.map(|m| Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap())).collect();
            for (prompt, key) in [(false, "text"), (true, "prompt")] {
                assert_eq!(template.render(&messages, prompt).unwrap(), case[key].as_str().unwrap(), "{name}");
            }
        }
    }
    // Marks of another family than the tokenizer's are told.
    let marks = |name: &str| Template::choose(&name.parse().unwrap(), &tokenizer).unwrap().unknown_marks(&tokenizer);
    assert_eq!(marks("qwen-3"), Vec::<&str>::new());
    assert_eq!(marks("deepseek-r1"), ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]);
}

/// Each within a second or two, whatever it does.
#[test]
fn a_template_that_runs_away_is_stopped() {
    let row = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]});
    for source in [
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=['ab']) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=['ab']) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=['ab']) %}{% for i in range(30) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | string }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ ('x' * 9999999) * 9999 }}",
        "{{ [1] * 10**9 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' | indent(10**9) }}",
        "{{ range(10**9) | list | length }}",
        "{{ 'a'.replace('', 'b' * 99999999) }}",
        "{{ '%1000000000d' | format(1) }}",
    ] {
        let message = Model::new(Some(source)).encode(&row, TrainOn::Assistant).unwrap_err();
        assert!(message.contains("chat_template.jinja") && !message.contains('\n'), "{source}: {message}");
    }
}
