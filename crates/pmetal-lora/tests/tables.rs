//! Adapters that carry an embedding or a head, against PEFT: `scripts/parity/tables.py` made the fixtures.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::{DType, Device, Tensor, safetensors};
use pmetal_lora::{AdapterFile, Base, LoraConfig, ModulesToSave, SINGLE_FILE, Use, attach, attach_file, save};
use pmetal_models::{CausalLMModel, Checkpoint, EMBEDDING, HEAD, Input, load};
use pmetal_ops::{Arena, backward, linear_cross_entropy, no_grad};

const CASES: [&str; 8] =
    ["untied", "untied-head", "tied", "tied-embedding-alone", "grown", "grown-tied", "grown-apart", "grown-unnamed"];

fn crate_path(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn open_base(name: &str, dtype: DType) -> Box<dyn CausalLMModel> {
    let checkpoint = Checkpoint::open(&crate_path("../pmetal-models/tests/fixtures").join(name)).unwrap();
    load(&checkpoint, dtype, &Device::Cpu, None).unwrap()
}

/// A case of the fixtures: the adapter, and what PEFT computed with it.
fn case(name: &str) -> (AdapterFile, HashMap<String, Tensor>) {
    let folder = crate_path("tests/fixtures").join(name);
    let expected = safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    (AdapterFile::open(&folder.join("adapter")).unwrap(), expected)
}

/// The adapter on its base.
fn adapted(file: &AdapterFile, purpose: Use) -> (Box<dyn CausalLMModel>, Option<Arena>) {
    let mut model = open_base(&file.base, DType::F32);
    let arena = attach_file(model.as_mut(), file, purpose).unwrap();
    (model, arena)
}

fn rows(expected: &HashMap<String, Tensor>) -> Vec<Vec<u32>> {
    let ids = |row| expected[&format!("ids.{row}")].to_vec1::<i64>().unwrap().into_iter().map(|x| x as u32).collect();
    (0..3).map(ids).collect()
}

fn logits(model: &dyn CausalLMModel, ids: &[u32]) -> Tensor {
    let hidden = no_grad(|| model.forward(&Input::rows(ids, &[ids.len()]), None)).unwrap();
    model.logits(hidden.tensor()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (values(got), values(want));
    let scale = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= 1e-4 * scale, "{what}: differs by {worst:e} where the largest value is {scale:e}");
}

#[test]
fn pefts_adapters_with_tables_give_pefts_logits() {
    for name in CASES {
        let (file, expected) = case(name);
        for purpose in [Use::Inference, Use::Training] {
            let (model, _) = adapted(&file, purpose);
            for (row, ids) in rows(&expected).iter().enumerate() {
                let what = format!("{name}, row {row}, {purpose:?}");
                assert_close(&logits(model.as_ref(), ids), &expected[&format!("logits.{row}")], &what);
            }
        }
    }
}

#[test]
fn losses_and_gradients_equal_pefts() {
    // a table that is carried and not named is trained on here, and held by PEFT
    for name in CASES.into_iter().filter(|&name| name != "grown-unnamed") {
        let (file, expected) = case(name);
        let (model, arena) = adapted(&file, Use::Training);
        let arena = arena.unwrap();
        let rows = rows(&expected);
        let labels: Vec<i64> =
            rows.iter().flat_map(|row| row[1..].iter().map(|&id| i64::from(id)).chain([-100])).collect();
        let counted = labels.iter().filter(|&&label| label >= 0).count();
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
        let hidden = model.forward(&Input::rows(&rows.concat(), &lengths), None).unwrap();
        let scale = 1.0 / counted as f32;
        let entropy = linear_cross_entropy(&hidden, model.head(), &labels, scale, model.logits_spec()).unwrap();
        assert_close(entropy.loss.tensor(), &expected["loss"], name);
        backward(entropy.loss).unwrap();
        let wanted: Vec<&String> = expected.keys().filter(|key| key.starts_with("grad.")).collect();
        assert_eq!(wanted.len(), arena.params().count(), "{name}");
        for param in arena.params() {
            let want = &expected[&format!("grad.base_model.model.{}", param.name())];
            assert_close(&param.grad().unwrap(), want, &format!("{name}, {}", param.name()));
        }
    }
}

#[test]
fn what_is_saved_reads_back_bit_by_bit_and_is_the_same_model() {
    for name in CASES {
        let (file, expected) = case(name);
        let (model, arena) = adapted(&file, Use::Training);
        let folder = tempfile::tempdir().unwrap();
        let base = Base { name: &file.base, spec: model.spec(), text_module: None };
        save(folder.path(), &file.config, base, &arena.unwrap()).unwrap();
        for path in [folder.path().to_path_buf(), folder.path().join(SINGLE_FILE)] {
            let again = AdapterFile::open(&path).unwrap();
            for (name, tensor) in &again.tensors {
                assert_eq!(values(tensor), values(&file.tensors[name]), "{name}");
            }
            let (again, _) = adapted(&again, Use::Inference);
            assert_eq!(again.spec(), model.spec());
            for ids in rows(&expected) {
                assert_eq!(values(&logits(again.as_ref(), &ids)), values(&logits(model.as_ref(), &ids)), "{name}");
            }
        }
    }
}

#[test]
fn a_tied_table_is_saved_for_both_of_its_modules() {
    let (file, _) = case("tied");
    let (model, arena) = adapted(&file, Use::Training);
    let arena = arena.unwrap();
    assert!(arena.param(EMBEDDING).is_some() && arena.param(HEAD).is_none());
    let folder = tempfile::tempdir().unwrap();
    let base = Base { name: "base", spec: model.spec(), text_module: None };
    save(folder.path(), &file.config, base, &arena).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["modules_to_save"], serde_json::json!(["embed_tokens", "lm_head"]));
    assert_eq!(config["ensure_weight_tying"], true);
    let tensors = safetensors::load(folder.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let (embedding, head) = (format!("base_model.model.{EMBEDDING}"), format!("base_model.model.{HEAD}"));
    assert_eq!(values(&tensors[&embedding]), values(&tensors[&head]));
}

#[test]
fn tables_start_as_the_models_and_are_kept_in_its_dtype() {
    let modules = |list: &str| LoraConfig { modules_to_save: list.parse().unwrap(), ..LoraConfig::default() };
    for (base, list, tables) in
        [("llama", "embed_tokens,lm_head", 2), ("llama", "lm_head", 1), ("llama-tied", "embed_tokens", 1)]
    {
        let mut model = open_base(base, DType::BF16);
        let before = logits(model.as_ref(), &[5, 17, 42]);
        let arena = attach(model.as_mut(), &modules(list), 1).unwrap();
        // a trained head is not packed, and summed in another order
        let after = logits(model.as_ref(), &[5, 17, 42]);
        let largest = values(&before).iter().fold(0f32, |max, x| max.max(x.abs()));
        for (after, before) in values(&after).iter().zip(values(&before)) {
            assert!((after - before).abs() <= 1e-6 * largest, "{base}, {list}: {after} instead of {before}");
        }
        let trained: Vec<_> = arena.params().filter(|p| [EMBEDDING, HEAD].contains(&p.name())).collect();
        assert_eq!(trained.len(), tables);
        assert!(trained.iter().all(|p| p.value().dtype() == DType::BF16 && p.master().dtype() == DType::F32));
    }
    let error = attach(open_base("llama-tied", DType::F32).as_mut(), &modules("lm_head"), 1).err().unwrap().to_string();
    assert!(error.contains("name embed_tokens, which trains both"), "{error}");
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let refused = |name: &str, base: &str, change: &dyn Fn(&mut AdapterFile), reason: &str| {
        let (mut file, _) = case(name);
        change(&mut file);
        let error = attach_file(open_base(base, DType::F32).as_mut(), &file, Use::Inference).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let without = |name: &'static str| move |file: &mut AdapterFile| drop(file.tensors.remove(name));
    refused("grown", "llama", &without(HEAD), "lm_head.weight [96, 32]: save both");
    refused("grown", "llama", &without(EMBEDDING), "model.embed_tokens.weight is [96, 32]");
    let narrow = |file: &mut AdapterFile| {
        let table = file.tensors[EMBEDDING].narrow(1, 0, 16).unwrap().contiguous().unwrap();
        file.tensors.insert(EMBEDDING.into(), table);
    };
    refused("untied", "llama", &narrow, "this model needs rows of 32");
}

#[test]
fn a_table_that_is_named_and_missing_is_an_error_of_the_file() {
    let (file, _) = case("untied-head");
    let folder = tempfile::tempdir().unwrap();
    let source = crate_path("tests/fixtures/untied-head/adapter");
    fs::copy(source.join("adapter_model.safetensors"), folder.path().join("adapter_model.safetensors")).unwrap();
    let mut config = file.config.to_peft("llama", &["q_proj".into()], &[]);
    let mut error = |modules: serde_json::Value| {
        config["modules_to_save"] = modules;
        fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
        AdapterFile::open(folder.path()).err().map(|e| e.to_string())
    };
    assert_eq!(error(serde_json::json!(["lm_head"])), None);
    assert!(error(serde_json::json!(["embed_tokens"])).unwrap().contains("model.embed_tokens.weight is missing"));
    assert!(error(serde_json::json!(["norm"])).unwrap().contains("modules_to_save = \"norm\" is not supported"));
    assert_eq!(file.config.modules_to_save, ModulesToSave { embed_tokens: false, lm_head: true });
}

#[test]
fn tables_grow_as_transformers_means_them_to() {
    for name in ["grown", "grown-tied"] {
        let (file, expected) = case(name);
        let mut checkpoint = Checkpoint::open(&crate_path("../pmetal-models/tests/fixtures").join(&file.base)).unwrap();
        checkpoint.resize_vocabulary(99, &[]);
        let model = load(&checkpoint, DType::F32, &Device::Cpu, None).unwrap();
        assert_eq!(model.spec().vocab_size, 99);
        let (got, want) = (values(&model.embedding().tensor().unwrap()), values(&expected["resized"]));
        assert_eq!(got[..96 * 32], want[..96 * 32]);
        // transformers draws around the mean, with a billionth of the rows' covariance
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst < 1e-4, "{worst:e}");
    }
}
