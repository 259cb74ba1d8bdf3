//! `pmetal train` with an adapter: what it writes, and what must not change the result.

use std::{fs, path::Path};

use crate::common::{
    Space, close, column, command, finish, logits, metrics, model, read_json, refused, rows, says, succeed, tensors,
};

/// Trains an adapter of the fixture `llama` into the folder `name`, and returns the folder.
fn train(space: &Space, name: &str, more: &[&str]) -> String {
    let (model, rows, output) = (model("llama"), rows(), space.path(name));
    let base = ["train", "--model", &model, "--dataset", &rows, "--output", &output, "--learning-rate", "0.01"];
    succeed([&base[..], more].concat());
    output
}

#[test]
fn a_run_leaves_the_adapter_twice_and_its_metrics() {
    let space = Space::new();
    let output = train(&space, "out", &["--epochs", "2", "--eval-split", "0.25", "--eval-steps", "3", "--lora-r", "4"]);
    let mut names: Vec<String> =
        fs::read_dir(&output).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected = ["adapter_config.json", "adapter_model.safetensors", "lora_weights.safetensors", "metrics.jsonl"];
    assert_eq!(names, expected);

    let config = read_json(Path::new(&output).join("adapter_config.json"));
    assert_eq!((&config["r"], &config["lora_alpha"]), (&4.into(), &8.into()));
    assert_eq!(config["base_model_name_or_path"], model("llama"));
    let adapter = tensors(Path::new(&output).join("adapter_model.safetensors"));
    assert_eq!(adapter.len(), 2 * 7 * 2);
    assert!(adapter.contains_key("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"));
    assert_eq!(adapter, tensors(Path::new(&output).join("lora_weights.safetensors")));

    let rows = metrics(&output);
    let keys = |row: &serde_json::Value| row.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    let step = "step epoch loss grad_norm learning_rate tokens supervised_tokens tokens_per_second peak_memory_bytes";
    let eval = "step epoch eval_loss eval_tokens";
    // 12 rows in batches of 4, twice; evaluated before, after 3 steps, and after all 6
    let found: Vec<String> = rows.iter().map(keys).collect();
    assert_eq!(found, [eval, step, step, step, eval, step, step, step, eval]);
    let steps: Vec<f64> = column(&rows, "step");
    assert_eq!(steps, [0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 6.0, 6.0]);
    assert!(column(&rows, "tokens").is_sorted() && *column(&rows, "epoch").last().unwrap() == 2.0);
    close(&column(&rows, "learning_rate")[..2], &[0.01, 0.01 * 5.0 / 6.0], 1e-6);
}

#[test]
fn rows_that_are_learnt_lose_loss() {
    let space = Space::new();
    let rows = rows();
    let output = train(&space, "out", &["--epochs", "10", "--eval-dataset", &rows]);
    let losses = column(&metrics(&output), "eval_loss");
    assert!(losses.len() == 2 && losses[1] < losses[0] - 0.5, "{losses:?}");
}

#[test]
fn the_folder_and_the_single_file_give_the_same_logits_and_not_the_bases() {
    let space = Space::new();
    let base = model("llama");
    let output = train(&space, "out", &["--max-steps", "2"]);
    let folder = logits(&space, &["--model", &base, "--lora", &output]);
    let file = logits(&space, &["--model", &base, "--lora", &format!("{output}/lora_weights.safetensors")]);
    assert_eq!(folder, file);
    assert_eq!(folder["logits.0"].len(), 5 * 96);
    assert_ne!(folder, logits(&space, &["--model", &base]));
}

#[test]
fn training_starts_from_an_adapter_and_keeps_its_shape() {
    let space = Space::new();
    for name in ["adapter", "adapter-rslora"] {
        let first = model(&format!("llama/{name}"));
        let still = train(&space, name, &["--lora", &first]);
        let (was, is) =
            (read_json(format!("{first}/adapter_config.json")), read_json(format!("{still}/adapter_config.json")));
        for key in ["r", "lora_alpha", "use_rslora"] {
            assert_eq!(was[key], is[key], "{key}");
        }
        let file = "adapter_model.safetensors";
        assert_ne!(tensors(format!("{first}/{file}")), tensors(format!("{still}/{file}")));
        let fresh = train(&space, "fresh", &[]);
        assert_ne!(column(&metrics(&fresh), "loss")[0], column(&metrics(&still), "loss")[0]);
    }
}

#[test]
fn a_learning_rate_of_zero_leaves_an_adapter_as_it_was() {
    let space = Space::new();
    let first = model("llama/adapter");
    let (base, rows, output) = (model("llama"), rows(), space.path("out"));
    let args = ["train", "--model", &base, "--dataset", &rows, "--output", &output, "--lora", &first];
    succeed([&args[..], &["--learning-rate", "0"]].concat());
    let file = "adapter_model.safetensors";
    assert_eq!(tensors(format!("{first}/{file}")), tensors(format!("{output}/{file}")));
}

#[test]
fn however_the_rows_of_a_step_are_spread_the_losses_are_the_same() {
    let space = Space::new();
    let spread = |name: &str, more: &[&str]| {
        let output = train(&space, name, &[&["--epochs", "4"], more].concat());
        let rows = metrics(&output);
        [column(&rows, "loss"), column(&rows, "grad_norm"), column(&rows, "supervised_tokens")]
    };
    let whole = spread("whole", &["--batch-size", "16"]);
    assert_eq!(whole[0].len(), 4);
    let others = [
        spread("by-four", &["--batch-size", "4", "--gradient-accumulation-steps", "4"]),
        spread("one-by-one", &["--batch-size", "1", "--gradient-accumulation-steps", "16"]),
        spread("packed", &["--batch-size", "1", "--use-sequence-packing", "--max-seq-len", "256"]),
        spread("packs", &["--batch-size", "16", "--packing", "--max-seq-len", "32"]),
    ];
    for other in others {
        for (found, expected) in other.iter().zip(&whole) {
            close(found, expected, 1e-4);
        }
    }
}

#[test]
fn checkpointing_changes_no_bit() {
    let space = Space::new();
    let shared = ["--epochs", "2", "--lora-dropout", "0.1"];
    let kept = train(&space, "kept", &shared);
    let again = train(&space, "again", &[&shared[..], &["--gradient-checkpointing"]].concat());
    for key in ["loss", "grad_norm"] {
        assert_eq!(column(&metrics(&kept), key), column(&metrics(&again), key));
    }
    assert_eq!(adapter(&kept), adapter(&again));
}

#[test]
fn a_limit_of_memory_says_what_runs_again_and_whether_it_can_be_kept() {
    let space = Space::new();
    let (model, rows, output) = (model("llama"), rows(), space.path("out"));
    let base = ["train", "--model", &model, "--dataset", &rows, "--output", &output, "--max-steps", "1"];
    let run = |limit| succeed([&base[..], &["--memory-limit", limit]].concat());
    let plenty = run("4GiB").stderr;
    assert!(!plenty.contains("run again"), "{plenty}");
    says(&run("1MiB").stderr, &["2 of 2 layers run again in backward", "more than the 0.00 GiB of --memory-limit"]);
    says(&refused(2, [&base[..], &["--memory-limit", "much"]].concat()), &["--memory-limit"]);
}

#[test]
fn a_seed_decides_every_byte_whatever_the_threads() {
    let space = Space::new();
    let (base, rows) = (model("llama"), rows());
    let bytes = |name: &str, threads: &str, seed: &str| {
        let output = space.path(name);
        let args =
            ["train", "--model", &base, "--dataset", &rows, "--output", &output, "--epochs", "2", "--seed", seed];
        let more = ["--lora-dropout", "0.1", "--dtype", "bf16"];
        let ran = finish(command([&args[..], &more].concat()).env("RAYON_NUM_THREADS", threads));
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        adapter(&output)
    };
    let one = bytes("one", "1", "7");
    assert_eq!(one, bytes("again", "1", "7"));
    assert_eq!(one, bytes("three", "3", "7"));
    assert_ne!(one, bytes("other", "1", "8"));
}

fn adapter(output: &str) -> Vec<u8> {
    fs::read(Path::new(output).join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_dry_run_says_what_would_happen_and_leaves_nothing() {
    let space = Space::new();
    let output = space.path("out");
    let base = ["train", "--model", &model("llama"), "--dataset", &rows(), "--output", &output];
    let ran = succeed([&base[..], &["--dry-run", "--epochs", "3", "--lora-r", "4", "--eval-split", "4"]].concat());
    says(
        &ran.stdout,
        &["12 to train on, 4 to evaluate on", "9 (3 an epoch)", "optimizer", "activations", "2 of 2 layers"],
    );
    assert!(!std::fs::exists(&output).unwrap());
    // the figure is the one that the run itself reports
    let adapter = succeed([&base[..], &["--max-steps", "1", "--lora-r", "4"]].concat());
    let parameters = |text: &str, after: &str| -> String {
        let rest = text.split_once(after).unwrap_or_else(|| panic!("'{after}' is not in {text}")).1.trim_start();
        rest.split(' ').next().unwrap().to_owned()
    };
    assert_eq!(parameters(&ran.stdout, "trained "), parameters(&adapter.stderr, "training "));
    says(&refused(1, [&base[..], &["--dry-run", "--lora-target-modules", "x"]].concat()), &["called x"]);
}

#[test]
fn a_configuration_alone_tells_what_training_would_take() {
    let space = Space::new();
    let config = |name: &str| format!("{}/../pmetal-models/tests/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let counts = read_json(config("counts"));
    for (name, layers, active) in [("qwen3-30b-a3b", 48, Some(3_353_032_704_u64)), ("gemma-3-4b", 34, None)] {
        let base = ["train", "--model", &config(name), "--dry-run"];
        let json: serde_json::Value = serde_json::from_str(&succeed([&base[..], &["--json"]].concat()).stdout).unwrap();
        assert_eq!((&json["parameters"], &json["layers"]), (&counts[name], &layers.into()), "{name}");
        assert_eq!(json["active_parameters"].as_u64(), active);
        let [lora, qlora, full] = &json["methods"].as_array().unwrap()[..] else { panic!("{json}") };
        assert!(lora["trained"].as_u64() > Some(0) && lora["trained"] == qlora["trained"]);
        assert_eq!(full["trained"], counts[name]);
        let total = |method: &serde_json::Value| method["total"].as_u64().unwrap();
        assert!(total(qlora) < total(lora) && total(lora) < total(full));
        // a float of 16 bits for each weight; a little more than four for most of them
        let weights = |method: &serde_json::Value| -> u64 {
            ["weights", "mapped_weights"].iter().map(|part| method["memory"][part].as_u64().unwrap()).sum()
        };
        assert_eq!(weights(lora), 2 * counts[name].as_u64().unwrap());
        assert!(weights(qlora) > weights(lora) / 4 && weights(qlora) < weights(lora) / 2);
        let text = succeed(base.to_vec()).stdout;
        says(&text, &[&counts[name].to_string(), "lora", "qlora*", "full", "optimizer", "activations", "fits"]);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
    // a folder with nothing but the configuration, and rows that nothing can read
    std::fs::create_dir(space.path("alone")).unwrap();
    std::fs::copy(config("llama-3.2-1b"), space.path("alone/config.json")).unwrap();
    let alone = ["train", "--model", &space.path("alone")];
    let ran = succeed([&alone[..], &["--dataset", &rows(), "--dry-run", "--memory-limit", "1GiB"]].concat());
    says(&ran.stderr, &["no weights beside config.json"]);
    says(&ran.stdout, &["1235814400"]);
    assert!(ran.stdout.lines().any(|line| line.starts_with("fits") && line.ends_with("no")), "{}", ran.stdout);
    // without --dry-run rows are needed
    says(&refused(2, alone.to_vec()), &["--dataset"]);
}
