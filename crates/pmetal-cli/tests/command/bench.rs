//! `pmetal bench`.

use crate::common::{Space, model, refused, says, succeed};

#[test]
fn the_report_is_one_json_object() {
    let config = format!("{}/config.json", model("llama"));
    let sizes = ["--batch=2", "--seq=16", "--steps=2"];
    let ran = succeed(["bench", "train", "--device", "cpu", "--model-config", &config].into_iter().chain(sizes));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&report["device"], &report["dtype"]), (&"cpu".into(), &"f32".into()));
    for key in ["tok_s", "step_ms", "peak_bytes", "loss"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{report}");
    }
    // tokens over the median's time
    let tok_s = 2.0 * 16.0 / report["step_ms"].as_f64().unwrap() * 1e3;
    assert!((report["tok_s"].as_f64().unwrap() / tok_s - 1.0).abs() < 0.05, "{report}");
}

#[test]
fn packed_rows_fill_the_tokens_of_a_step() {
    let config = format!("{}/config.json", model("llama"));
    let sizes = ["--batch=3", "--seq=50", "--steps=2", "--packed"];
    let ran = succeed(["bench", "train", "--device", "cpu", "--model-config", &config].into_iter().chain(sizes));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["packed"], true);
    let tok_s = 150.0 / report["step_ms"].as_f64().unwrap() * 1e3;
    assert!((report["tok_s"].as_f64().unwrap() / tok_s - 1.0).abs() < 0.05, "{report}");
    assert!(report["fastest_step_ms"].as_f64() <= report["step_ms"].as_f64(), "{report}");
}

#[test]
fn reading_and_making_tokens_are_timed_apart() {
    let model = model("llama");
    let sizes = ["--prompt-tokens=20", "--tokens=8", "--runs=2"];
    let ran = succeed(["bench", "generate", "--device", "cpu", "--model", &model].into_iter().chain(sizes));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&report["device"], &report["prompt_tokens"]), (&"cpu".into(), &20.into()));
    for key in ["prefill_tok_s", "decode_tok_s", "peak_bytes"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{report}");
    }
    let config = format!("{model}/config.json");
    let random = ["bench", "generate", "--device", "cpu", "--model-config", &config].into_iter().chain(sizes);
    let report: serde_json::Value = serde_json::from_str(&succeed(random).stdout).unwrap();
    assert_eq!(report["tokens"], 8);
    refused(2, ["bench", "generate", "--model", &model, "--model-config", &config]);
    refused(2, ["bench", "generate"]);
    for flag in ["--prompt-tokens=0", "--tokens=1", "--runs=0"] {
        says(&refused(2, ["bench", "generate", "--model", &model, flag]), &["at least"]);
    }
}

#[test]
fn a_profile_accounts_for_all_of_the_time() {
    let accounted = |rows: &serde_json::Value, ops: &[&str]| {
        let rows = rows.as_array().unwrap();
        let shares: f64 = rows.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((shares - 1.0).abs() < 0.01, "{rows:?}");
        for op in ops {
            let row = rows.iter().find(|row| row["op"] == *op).unwrap_or_else(|| panic!("{op} in {rows:?}"));
            assert!(row["calls"].as_f64() > Some(0.0), "{row}");
        }
    };
    let config = format!("{}/config.json", model("llama"));
    let sizes = ["--batch=2", "--seq=16", "--steps=2", "--profile"];
    let ran = succeed(["bench", "train", "--device", "cpu", "--model-config", &config].into_iter().chain(sizes));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    accounted(
        &report["profile"],
        &["attention", "rope", "add_rms_norm", "gated_activation", "linear_cross_entropy", "adamw"],
    );
    says(&ran.stderr, &["OPERATIONS OF A STEP", "backward", "elsewhere"]);
    let rows = report["profile"].as_array().unwrap();
    let rates = |op: &str| rows.iter().find(|row| row["op"] == op).map(|row| (&row["gflop_s"], &row["gb_s"])).unwrap();
    assert!(rates("attention").0.as_f64() > Some(0.0) && rates("attention").1.as_f64() > Some(0.0), "{report}");
    assert!(rates("add_rms_norm").0.is_null() && rates("add_rms_norm").1.as_f64() > Some(0.0), "{report}");

    let sizes = ["--prompt-tokens=20", "--tokens=8", "--runs=1", "--profile"];
    let ran = succeed(["bench", "generate", "--device", "cpu", "--model", &model("llama")].into_iter().chain(sizes));
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    for part in ["prefill", "decode"] {
        accounted(&report["profile"][part], &["attention", "embedding", "logits", "sample", "write_rows"]);
    }
    says(&ran.stderr, &["OPERATIONS OF THE PROMPT", "OPERATIONS OF A TOKEN"]);
}

#[test]
fn sizes_of_nothing_and_configurations_of_nothing() {
    let space = Space::new();
    let config = format!("{}/config.json", model("llama"));
    for flag in ["--batch=0", "--steps=0", "--seq=1"] {
        says(&refused(2, ["bench", "train", "--model-config", &config, flag]), &["at least"]);
    }
    let nowhere = space.path("config.json");
    says(&refused(1, ["bench", "train", "--model-config", &nowhere]), &[&nowhere]);
    let broken = space.write("broken.json", "{");
    says(&refused(1, ["bench", "train", "--model-config", &broken]), &[&broken]);
}
