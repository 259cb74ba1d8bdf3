//! `pmetal doctor`, and what other verbs make of what it found.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

use crate::common::{Ran, Space, command, finish, model, refused, says};

/// Runs the command with a cache folder of its own.
fn in_cache(space: &Space, args: &[&str]) -> Ran {
    finish(command(args).env("PMETAL_CACHE", space.path("cache")))
}

#[test]
fn the_report_is_one_json_object_and_what_failed_before_is_on_again() {
    let space = Space::new();
    let kept = space.path("cache/doctor");
    fs::create_dir_all(&kept).unwrap();
    // the file is named by the level of this machine
    for level in ["portable", "AVX2", "AVX-512", "AVX-512 BF16", "AMX", "NEON", "NEON BF16"] {
        let subject = serde_json::json!({
            "device": format!("cpu {level}"), "driver": "", "version": env!("CARGO_PKG_VERSION"), "switched_off": ["rope"],
        });
        let name = format!("cpu-{}-{}.json", level.to_lowercase().replace(' ', "-"), env!("CARGO_PKG_VERSION"));
        fs::write(format!("{kept}/{name}"), subject.to_string()).unwrap();
    }
    let config = format!("{}/config.json", model("llama"));
    let bench = ["bench", "train", "--device", "cpu", "--model-config", &config, "--batch=1", "--seq=4", "--steps=1"];
    let ran = in_cache(&space, &bench);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("rope failed `pmetal doctor`").count(), 1, "{}", ran.stderr);
    let quiet = in_cache(&space, &[&bench[..], &["--quiet"]].concat());
    assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""));

    let ran = in_cache(&space, &["doctor", "--device", "cpu", "--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{}", ran.stdout);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((&report["device"], &report["os"]), (&"cpu".into(), &std::env::consts::OS.into()));
    assert!(report["version"].as_str().unwrap().starts_with(env!("CARGO_PKG_VERSION")), "{report}");
    assert_eq!(report["switched_off"], serde_json::json!([]));
    assert!(report["rates"]["teraflops"].as_f64().unwrap() > 0.0, "{report}");
    let checks = report["checks"].as_array().unwrap();
    for check in checks {
        assert!(check["forward_error"].as_f64().unwrap() <= check["tolerance"].as_f64().unwrap(), "{check}");
        assert!(check["forward_us"].as_f64().unwrap() > 0.0 && check["failure"].is_null(), "{check}");
    }
    let names: BTreeSet<&str> = checks.iter().map(|check| check["operation"].as_str().unwrap()).collect();
    let all =
        ["adamw", "attention", "elementwise", "embedding", "linear", "linear_cross_entropy", "logits", "rms_norm"];
    assert!(all.iter().all(|name| names.contains(name)), "{names:?}");
    assert_eq!(in_cache(&space, &bench).stderr, "");
}

#[test]
fn the_table_fits_a_terminal() {
    let space = Space::new();
    let ran = in_cache(&space, &["doctor", "--device", "cpu"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{}", ran.stdout);
    let widest = ran.stdout.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest < 100, "{}", ran.stdout);
    let rows = ran.stdout.lines().filter(|line| line.ends_with("  ok")).count();
    assert!(rows > 40 && ran.stdout.ends_with("agrees with its reference\n"), "{}", ran.stdout);
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    if cfg!(not(target_os = "macos")) {
        says(&refused(1, ["doctor", "--device", "metal"]), &["Metal", "macOS"]);
    }
    refused(2, ["doctor", "--device", "abacus"]);
}
