//! GGUF files against the Hugging Face folders they were made from: the fixtures of `pmetal-gguf`.

mod common;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use common::{Fixture, assert_close, packed_logits};
use pmetal_models::{Checkpoint, load, save_pretrained};

const TWINS: [&str; 5] = ["llama", "llama-biased", "llama3-rope", "qwen2-tied", "qwen3-tied-f16"];

fn gguf(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pmetal-gguf/tests/fixtures").join(format!("{name}.gguf"))
}

/// Those of the further families whose every number llama.cpp's metadata hold.
const FAMILIES: [&str; 9] = [
    "llama-yarn-factor-hub",
    "qwen3-moe",
    "phi3-longrope-partial-hub",
    "phi3-window-hub",
    "gpt-oss-mxfp4-hub",
    "granite-tied-hub",
    "granitemoe-tied-hub",
    "cohere",
    "cohere2-hub",
];

#[test]
fn twins_give_the_same_logits() {
    for name in TWINS.into_iter().chain(FAMILIES) {
        let (fixture, checkpoint) = (Fixture::open(name), Checkpoint::open(&gguf(name)).unwrap());
        let model = load(&checkpoint, DType::F32, &Device::Cpu, None).unwrap();
        for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
            assert_close(&fixture.expected[&format!("logits.{i}")], got, 1e-4, &format!("{name} row {i}"));
        }
        let folder = Checkpoint::open(&fixture.path).unwrap();
        assert_eq!(checkpoint.stored_dtype(), folder.stored_dtype(), "{name}");
    }
}

#[test]
fn a_gguf_file_becomes_a_hugging_face_folder() {
    for name in ["llama-biased", "qwen2-tied"] {
        let (fixture, checkpoint) = (Fixture::open(name), Checkpoint::open(&gguf(name)).unwrap());
        let model = load(&checkpoint, DType::F32, &Device::Cpu, None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        save_pretrained(&*model, checkpoint.config(), DType::F32, folder.path(), u64::MAX).unwrap();
        let again = load(&Checkpoint::open(folder.path()).unwrap(), DType::F32, &Device::Cpu, None).unwrap();
        for (i, got) in packed_logits(&*again, &fixture.rows(), None).iter().enumerate() {
            assert_close(&fixture.expected[&format!("logits.{i}")], got, 1e-4, &format!("{name} row {i}"));
        }
    }
}

#[test]
fn a_folder_around_one_gguf_file_is_a_model() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(gguf("qwen2-tied"), folder.path().join("model.gguf")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.spec().model_type.as_str(), checkpoint.path()), ("qwen2", folder.path()));
    assert!(checkpoint.gguf().is_some());
}

/// The fixture's divisors are not those of a released model, so no `config.json` can state them.
#[test]
fn divisors_without_a_name_are_not_saved() {
    let checkpoint = Checkpoint::open(&gguf("llama3-rope")).unwrap();
    let model = load(&checkpoint, DType::F32, &Device::Cpu, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = save_pretrained(&*model, checkpoint.config(), DType::F32, folder.path(), u64::MAX).unwrap_err();
    assert!(error.to_string().contains("rope_scaling"), "{error}");
}
