//! Flags that do not go together or are outside their range: exit code 2, and the flag by name.

use crate::common::{Space, model, refused, rows, run, says};

/// The arguments of a run that would be short but for `more`.
fn with(more: &[&str]) -> (Space, Vec<String>) {
    let space = Space::new();
    let (model, rows, output) = (model("llama"), rows(), space.path("out"));
    let base = ["train", "--model", &model, "--dataset", &rows, "--output", &output];
    let args = base.iter().chain(more).map(|s| s.to_string()).collect();
    (space, args)
}

/// What our own checks say, in one line.
fn ours(code: i32, more: &[&str]) -> String {
    let (_space, args) = with(more);
    refused(code, args)
}

/// What the parser of flags says, in several lines.
fn parser(more: &[&str]) -> String {
    let (_space, args) = with(more);
    let ran = run(args);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", ran.stderr);
    assert!(ran.stderr.starts_with("error: ") && !ran.stderr.contains("panicked"), "{}", ran.stderr);
    ran.stderr
}

#[test]
fn shares_of_the_rows() {
    says(&ours(2, &["--eval-split", "1.5"]), &["--eval-split: 1.5", "a share of the rows"]);
    for share in ["0", "-1", "nan", "inf", "0.0001", "16", "1e9", "1e-300"] {
        says(&ours(2, &[&format!("--eval-split={share}")]), &["--eval-split", "rows"]);
    }
    says(&parser(&["--eval-split", "0.1", "--eval-dataset", "x.jsonl"]), &["--eval-split", "--eval-dataset"]);
}

#[test]
fn numbers_outside_their_range() {
    let flags = [
        "--batch-size=0",
        "--gradient-accumulation-steps=0",
        "--epochs=nan",
        "--epochs=-1",
        "--learning-rate=nan",
        "--learning-rate=-1",
        "--weight-decay=inf",
        "--max-grad-norm=-1",
        "--warmup-ratio=2",
    ];
    for flag in flags {
        let name = flag.split('=').next().unwrap();
        says(&ours(2, &[flag]), &[name, "must"]);
    }
    for flag in ["--lora-r=0", "--lora-r=100000000000", "--lora-alpha=0", "--lora-alpha=nan", "--lora-dropout=1"] {
        let key = flag.trim_start_matches('-').split('=').next().unwrap().replace('-', "_");
        says(&ours(1, &[flag]), &[&key, "expected"]);
    }
    for flag in ["--warmup-steps=-1", "--batch-size=x", "--max-seq-len=1.5", "--seed=-1"] {
        says(&parser(&[flag]), &[flag.split('=').next().unwrap()]);
    }
}

#[test]
fn flags_that_do_not_go_together() {
    says(&ours(2, &["--use-sequence-packing"]), &["--use-sequence-packing", "add --max-seq-len"]);
    for flag in ["--lora-r=4", "--lora-alpha=4", "--lora-dropout=0.1", "--use-rslora", "--lora=x"] {
        says(&ours(2, &["--fine-tune-type", "full", flag]), &["--fine-tune-type full", "leave out the --lora options"]);
    }
    says(&ours(2, &["--from-scratch"]), &["--from-scratch", "add --fine-tune-type full"]);
    let adapter = model("llama/adapter");
    for flag in ["--lora-r=4", "--lora-alpha=4", "--lora-target-modules=q_proj", "--use-rslora"] {
        says(&parser(&["--lora", &adapter, flag]), &["--lora <PATH|ID>", flag.split('=').next().unwrap()]);
    }
    says(&parser(&["--warmup-steps=3", "--warmup-ratio=0.1"]), &["--warmup-steps", "--warmup-ratio"]);
}

#[test]
fn names_that_are_not_known() {
    says(&parser(&["--dtype", "int8"]), &["--dtype", "'int8'", "auto, bf16, f16, f32"]);
    says(&parser(&["--device", "tpu"]), &["--device", "'tpu'", "auto, cpu"]);
    says(&parser(&["--train-on", "user"]), &["--train-on", "'user'", "assistant, last or all"]);
    says(
        &parser(&["--chat-template", "none"]),
        &["--chat-template", "'none'", "auto, chatml, llama-3, ", "alpaca or a file"],
    );
    says(&parser(&["--lr-scheduler-type", "step"]), &["--lr-scheduler-type", "linear, cosine, constant"]);
    says(&parser(&["--fine-tune-type", "dora"]), &["--fine-tune-type", "lora, full"]);
    says(&parser(&["--no-such-flag"]), &["--no-such-flag"]);
    let known = "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
    says(
        &ours(1, &["--lora-target-modules", "nonsense"]),
        &["no linear layer of this model is called nonsense", known],
    );
    says(&ours(1, &["--lora-target-modules", "q_proj,c_attn"]), &["called c_attn", known]);
}

#[test]
fn a_run_that_cannot_start_leaves_the_last_ones_metrics_alone() {
    let (space, args) = with(&["--lora-target-modules", "nonsense"]);
    let metrics = space.write("out/metrics.jsonl", "{\"step\": 1}\n");
    refused(1, args);
    assert_eq!(std::fs::read_to_string(metrics).unwrap(), "{\"step\": 1}\n");
}

#[test]
fn a_run_that_diverges_stops_and_writes_no_adapter() {
    let (space, args) = with(&["--learning-rate", "1e30", "--epochs", "9"]);
    let message = refused(1, args);
    says(&message, &["not finite 3 steps in a row", "lower the learning rate"]);
    assert!(!std::fs::exists(space.path("out/adapter_model.safetensors")).unwrap());
}
