//! What a person, a pipe and a script see.

use serde_json::Value;

use crate::common::{Space, chat_model, command, finish, model, quickstart, rows, run, says, succeed};

const VERBS: [&str; 6] = ["train", "infer", "models", "logits", "bench", "completions"];

#[test]
fn help_fits_80_columns_and_shows_examples() {
    for verb in VERBS {
        let long = succeed([verb, "--help"]).stdout;
        says(&long, &["Usage: pmetal", &format!("pmetal {verb}")]);
        let short = succeed([verb, "-h"]).stdout;
        assert!(short.lines().count() <= long.lines().count());
    }
    let top = succeed(["--help"]).stdout;
    says(&top, &["A short tour:", "pmetal train --model", "--verbose", "--quiet"]);
    for text in [top, succeed(["models"]).stdout, succeed(["train", "--help"]).stdout] {
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        }
    }
}

#[test]
fn models_are_those_of_the_registry() {
    let table = succeed(["models"]).stdout;
    let json: Value = serde_json::from_str(&succeed(["models", "--json"]).stdout).unwrap();
    let families = json["families"].as_array().unwrap();
    // the error for an unknown architecture comes from the registry too
    let space = Space::new();
    let copy = space.edited(&model("llama"), "m", "config.json", |config| config["model_type"] = "mystery".into());
    let known = crate::common::told(&space, &copy);
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/models.md")).unwrap();
    assert!(!families.is_empty());
    for family in families {
        let model_type = family["model_type"].as_str().unwrap();
        says(&known, &[model_type]);
        let row = table.lines().find(|line| line.split_whitespace().any(|word| word == model_type)).unwrap();
        let (name, sizes) = (family["name"].as_str().unwrap(), family["sizes"].as_str().unwrap());
        says(row, &[name, sizes]);
        let described = page.lines().find(|line| line.starts_with(&format!("| {name} | `{model_type}`"))).unwrap();
        says(described, &[sizes]);
        let gguf = family["gguf_architectures"].as_array().unwrap();
        assert_eq!(family["gguf"], !gguf.is_empty());
        for name in gguf.iter().map(|name| name.as_str().unwrap()) {
            says(row, &[name]);
            says(described, &[&format!("`{name}`")]);
        }
        if let Some(whole) = family["text_part_of"].as_str() {
            says(&table, &[whole]);
            says(described, &[&format!("text part of `{whole}`")]);
        }
    }
}

#[test]
fn completions_know_every_verb_and_flag() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = succeed(["completions", shell]).stdout;
        for verb in VERBS {
            says(&script, &[verb]);
        }
        says(&script, &["gradient-checkpointing", "chat-template"]);
    }
}

#[test]
fn manual_pages_for_every_verb() {
    let space = Space::new();
    succeed(["man", "--output", &space.path("man")]);
    for verb in VERBS {
        let page = std::fs::read_to_string(space.path(&format!("man/pmetal-{verb}.1"))).unwrap();
        says(&page, &[".TH", ".SH NAME", ".SH EXAMPLES", &format!("pmetal {verb}")]);
    }
    says(&std::fs::read_to_string(space.path("man/pmetal.1")).unwrap(), &["pmetal\\-train(1)", ".SH EXAMPLES"]);
    assert!(!std::fs::exists(space.path("man/pmetal-man.1")).unwrap());
}

#[test]
fn quiet_leaves_results_and_errors() {
    let space = Space::new();
    let (model, rows, output) = (model("llama"), rows(), space.path("out"));
    let base = ["train", "--model", &model, "--dataset", &rows, "--output", &output, "--max-steps", "1"];
    let quiet = succeed([&base[..], &["--quiet"]].concat());
    assert_eq!((quiet.stderr.as_str(), quiet.stdout.trim_end()), ("", format!("adapter: {output}").as_str()));
    let failed = run(["-q", "logits", "--model", "nowhere", "--ids", "x", "--output", "y"]);
    assert!(failed.stderr.starts_with("error: ") && failed.stderr.lines().count() == 1, "{}", failed.stderr);
    let normal = succeed(base);
    says(&normal.stderr, &["step 1/1"]);
}

#[test]
fn verbose_says_what_is_opened() {
    let said = succeed(["-v", "infer", "--model", &chat_model(), "--prompt", "x", "--max-tokens", "1"]);
    says(&said.stderr, &["DEBUG", &chat_model()]);
    let both = run(["models", "-q", "-v"]);
    assert_eq!(both.code, Some(2));
    says(&both.stderr, &["--quiet", "--verbose"]);
}

#[test]
fn pipes_and_logs_get_no_control_characters() {
    let space = Space::new();
    let output = space.path("out");
    let train = ["train", "--model", &chat_model(), "--dataset", &quickstart("heldout.jsonl"), "--output", &output];
    let ran = succeed([&train[..], &["--max-steps", "2", "--logging-steps", "1"]].concat());
    let help = succeed(["--help"]);
    let refused = run(["train", "--model", "\u{1b}[31mred\u{7}"]);
    for text in [ran.stdout, ran.stderr, help.stdout, refused.stderr] {
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
    let dressed = finish(command(["models"]).env("CLICOLOR_FORCE", "1").env_remove("NO_COLOR"));
    says(&dressed.stdout, &["\u{1b}[1mFAMILY"]);
    let plain = finish(command(["models"]).env("CLICOLOR_FORCE", "1").env("NO_COLOR", "1"));
    assert!(!plain.stdout.contains('\u{1b}'));
}

#[test]
fn usage_errors_are_a_line_with_the_way_on() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["train"], &["--model <", "--dataset <", "see `pmetal train --help`"]),
        (&["train", "--modle", "x"], &["'--modle'", "'--model'", "see `pmetal train --help`"]),
        (&["trian"], &["'trian'", "'train'", "see `pmetal --help`"]),
        (&["infer", "--model", "x", "--prompt", "x", "--temperature", "hot"], &["'hot'", "--temperature"]),
        (&["infer", "--model", "", "--prompt", "x"], &["--model"]),
        (&["completions", "tcsh"], &["'tcsh'", "bash", "see `pmetal completions --help`"]),
        (&["train", "--model", "x", "--dataset", "x", "--batch-size", "99999999999999999999"], &["--batch-size"]),
        (&["train", "--dataset", "x", "--model"], &["--model <", "none was supplied"]),
        (&["logits", "--model", "x", "--ids", "y"], &["--output <FILE>", "not provided"]),
        (&["models", "extra"], &["'extra'"]),
    ];
    for (args, parts) in cases {
        let ran = run(*args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        says(&ran.stderr, &["error: "]);
        says(&ran.stderr, parts);
    }
}

#[test]
fn a_model_too_large_for_the_machine_is_refused_before_it_is_made() {
    let space = Space::new();
    let file = "config.json";
    let copy = space.edited(&model("llama"), "large", file, |config| {
        config["vocab_size"] = 4_194_304.into();
        config["hidden_size"] = 4_194_304.into();
    });
    let config = space.path("large/config.json");
    let message = crate::common::refused(1, ["bench", "train", "--model-config", &config]);
    says(&message, &["parameters", "bytes of memory", "correct config.json"]);
    let output = space.path("out");
    let train = ["train", "--model", &copy, "--dataset", &rows(), "--output", &output];
    let scratch = ["--from-scratch", "--fine-tune-type", "full"];
    says(&crate::common::refused(1, [&train[..], &scratch].concat()), &["bytes of memory"]);
}
