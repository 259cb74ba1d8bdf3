//! The model card of a folder without one: what it was made from, how to use it, and the figures of its training.

use std::{fs, path::Path};

use serde_json::Value;

use super::folder::Item;
use crate::{Error, Result, is_repo_id};

const ADAPTER_CONFIG: &str = "adapter_config.json";
const CONFIG: &str = "config.json";
const METRICS: &str = "metrics.jsonl";
/// Stands in commands for a base model that is no id of the hub.
const UNNAMED_BASE: &str = "BASE_MODEL";

/// README.md for the repository `id`.
pub(super) fn model_card(folder: &Path, id: &str, items: &[Item]) -> Result<String> {
    let has = |name: &str| items.iter().any(|item| item.path == name);
    let title = id.split_once('/').map_or(id, |(_, name)| name);
    let mut card = if has(ADAPTER_CONFIG) {
        adapter(&read_json(&folder.join(ADAPTER_CONFIG))?, id, title)
    } else if has(CONFIG) {
        model(id, title, "transformers", &read_json(&folder.join(CONFIG))?)
    } else {
        model(id, title, "gguf", &Value::Null)
    };
    if has(METRICS) {
        card += &figures(&folder.join(METRICS))?;
    }
    Ok(card)
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(pmetal_core::Error::io("read", path))?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::Content { path: path.to_path_buf(), reason: format!("bad JSON: {e}") })
}

/// The front matter. The licence is the owner's to name.
fn front(base: Option<&str>, library: &str, tags: &[&str]) -> String {
    let base = base.map(|base| format!("base_model: {base}\n")).unwrap_or_default();
    let library = if library == "gguf" { String::new() } else { format!("library_name: {library}\n") };
    let tags: String = tags.iter().map(|tag| format!("- {tag}\n")).collect();
    format!("---\n{base}{library}pipeline_tag: text-generation\ntags:\n{tags}---\n\n")
}

/// The id of a model in a text that may be a path of the machine that trained.
fn base_id(text: Option<&Value>) -> Option<&str> {
    text.and_then(Value::as_str)
        .map(|text| text.split(['@', ':']).next().unwrap_or(text))
        .filter(|text| is_repo_id(text))
}

fn adapter(config: &Value, id: &str, title: &str) -> String {
    let base = base_id(config.get("base_model_name_or_path"));
    let named = base.unwrap_or(UNNAMED_BASE);
    let of = base.map(|base| format!(" for `{base}`")).unwrap_or_default();
    let mut card = front(base, "peft", &["lora", "pmetal"]);
    card += &format!("# {title}\n\nA LoRA adapter{of}, trained with PMetal.\n\n## Use\n\n");
    card += &format!("```sh\npmetal infer --model {named} --lora {id} --chat --prompt \"…\"\n```\n\n");
    card += &format!(
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         tokenizer = AutoTokenizer.from_pretrained(\"{named}\")\n\
         model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"{named}\"), \"{id}\")\n```\n\n"
    );
    card += "## Adapter\n\n| setting | value |\n|---|---|\n";
    for key in ["r", "lora_alpha", "lora_dropout", "use_rslora"] {
        if let Some(value) = config.get(key).filter(|value| value.is_number() || value.is_boolean()) {
            card += &format!("| {key} | {value} |\n");
        }
    }
    let modules = match config.get("target_modules") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        Some(Value::String(name)) => name.clone(),
        _ => String::new(),
    };
    if !modules.is_empty() {
        card += &format!("| target_modules | {modules} |\n");
    }
    card
}

fn model(id: &str, title: &str, library: &str, config: &Value) -> String {
    let base = base_id(config.get("_name_or_path")).filter(|base| *base != id);
    let mut card = front(base, library, &["pmetal"]);
    card += &format!("# {title}\n\nTrained with PMetal.\n\n## Use\n\n");
    card += &format!("```sh\npmetal infer --model {id} --chat --prompt \"…\"\n```\n");
    if library == "transformers" {
        card += &format!(
            "\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\"{id}\")\nmodel = AutoModelForCausalLM.from_pretrained(\"{id}\")\n```\n"
        );
    }
    card
}

/// A table of what `metrics.jsonl` says.
fn figures(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(pmetal_core::Error::io("read", path))?;
    let rows: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let column = |name: &str| -> Vec<f64> { rows.iter().filter_map(|row| row.get(name)?.as_f64()).collect() };
    let of_steps: Vec<&Value> = rows.iter().filter(|row| row.get("loss").is_some()).collect();
    let Some(last) = of_steps.last() else { return Ok(String::new()) };
    let number = |name: &str| last.get(name).and_then(Value::as_f64);
    let mut table = String::from("\n## Training\n\n| | |\n|---|---|\n");
    for (name, key, digits) in [
        ("steps", "step", 0),
        ("epochs", "epoch", 2),
        ("tokens", "tokens", 0),
        ("supervised tokens", "supervised_tokens", 0),
    ] {
        if let Some(value) = number(key) {
            table += &format!("| {name} | {value:.digits$} |\n");
        }
    }
    let rate = column("learning_rate").into_iter().fold(0.0, f64::max);
    table += &format!("| highest learning rate | {rate:.2e} |\n");
    for (name, key) in [("loss, first and last step", "loss"), ("evaluation loss, before and after", "eval_loss")] {
        if let [first, .., last] | [first @ last] = column(key).as_slice() {
            table += &format!("| {name} | {first:.4}, {last:.4} |\n");
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upload::folder::items;

    fn card(files: &[(&str, &str)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let items = items(folder.path(), &()).unwrap();
        model_card(folder.path(), "me/my-adapter", &items).unwrap()
    }

    #[test]
    fn an_adapters_card_names_its_base_and_its_figures() {
        let config = r#"{"base_model_name_or_path": "org/base@v1", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}"#;
        let metrics = "{\"step\":0,\"eval_loss\":3.5}\n{\"step\":1,\"epoch\":0.5,\"loss\":3.25,\"learning_rate\":0.0002,\"tokens\":90}\n\
                       {\"step\":2,\"epoch\":1.0,\"loss\":2.5,\"learning_rate\":0.0001,\"tokens\":180}\n{\"step\":2,\"eval_loss\":2.75}\n";
        let card = card(&[("adapter_config.json", config), ("metrics.jsonl", metrics)]);
        let front = "---\nbase_model: org/base\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- pmetal\n---\n";
        assert!(card.starts_with(front), "{card}");
        for part in [
            "# my-adapter\n",
            "pmetal infer --model org/base --lora me/my-adapter",
            "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"org/base\"), \"me/my-adapter\")",
            "| r | 8 |",
            "| target_modules | q_proj, v_proj |",
            "| steps | 2 |",
            "| tokens | 180 |",
            "| highest learning rate | 2.00e-4 |",
            "| loss, first and last step | 3.2500, 2.5000 |",
            "| evaluation loss, before and after | 3.5000, 2.7500 |",
        ] {
            assert!(card.contains(part), "{part} is not in\n{card}");
        }
        assert!(!card.contains("license"), "{card}");
    }

    #[test]
    fn a_path_of_this_machine_is_not_published() {
        let card = card(&[("adapter_config.json", r#"{"base_model_name_or_path": "/home/me/base"}"#)]);
        assert!(!card.contains("/home/me") && !card.contains("base_model:") && card.contains(UNNAMED_BASE), "{card}");
    }

    #[test]
    fn a_models_card_is_for_transformers() {
        let card = card(&[("config.json", "{}")]);
        assert!(card.contains("library_name: transformers") && card.contains("--model me/my-adapter --chat"), "{card}");
        assert!(!card.contains("Training"), "{card}");
    }
}
