//! Adapters against PEFT: its folders open here and give its logits, ours hold the same numbers, and nothing is let through by halves.
//! How the fixtures were made: `scripts/make-parity-fixtures.py`.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::{DType, Device, Tensor, safetensors};
use pmetal_lora::{AdapterFile, Base, LoraConfig, SINGLE_FILE, TargetModules, Use, attach, attach_file, detach, save};
use pmetal_models::{CausalLMModel, Checkpoint, Input, load};
use pmetal_ops::no_grad;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../pmetal-models/tests/fixtures").join(name)
}

fn open(name: &str) -> Box<dyn CausalLMModel> {
    load(&Checkpoint::open(&fixture(name)).unwrap(), DType::F32, &Device::Cpu, None).unwrap()
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu).unwrap()
}

fn logits(model: &dyn CausalLMModel, ids: &Tensor) -> Vec<f32> {
    let ids: Vec<u32> = ids.to_vec1::<i64>().unwrap().into_iter().map(|x| x as u32).collect();
    let hidden = no_grad(|| model.forward(&Input::rows(&ids, &[ids.len()]), None)).unwrap();
    model.logits(hidden.tensor()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(got: &[f32], want: &Tensor, what: &str) {
    let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= 1e-4 * scale, "{what}: differs by {worst:e} where the largest value is {scale:e}");
}

fn compare(name: &str, adapter: &str, key: &str) {
    let file = AdapterFile::open(&fixture(name).join(adapter)).unwrap();
    let expected = expected(name);
    for purpose in [Use::Inference, Use::Training] {
        let mut model = open(name);
        attach_file(model.as_mut(), &file, purpose).unwrap();
        for row in 0..3 {
            let got = logits(model.as_ref(), &expected[&format!("ids.{row}")]);
            assert_close(&got, &expected[&format!("{key}.{row}")], &format!("{name}, row {row}, {purpose:?}"));
        }
    }
}

#[test]
fn pefts_adapters_give_pefts_logits() {
    for entry in fs::read_dir(fixture("")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if fixture(&name).join("adapter").is_dir() {
            compare(&name, "adapter", "lora_logits");
        }
    }
    compare("llama", "adapter-rslora", "rslora_logits");
}

#[test]
fn what_is_saved_reads_back_bit_by_bit_from_folder_and_single_file() {
    let original = AdapterFile::open(&fixture("qwen3/adapter")).unwrap();
    let mut model = open("qwen3");
    let arena = attach_file(model.as_mut(), &original, Use::Training).unwrap().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    fs::create_dir(&dir).unwrap();
    let base = Base { name: "some/base", spec: model.spec(), text_module: None };
    save(&dir, &original.config, base, &arena).unwrap();
    for path in [dir.clone(), dir.join(SINGLE_FILE)] {
        let again = AdapterFile::open(&path).unwrap();
        assert_eq!(again.base, "some/base");
        assert_eq!(again.config.scale(), original.config.scale());
        assert!(again.tensors.keys().eq(original.tensors.keys()));
        for (name, tensor) in &again.tensors {
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(tensor), bits(&original.tensors[name]), "{name}");
        }
    }
}

#[test]
fn an_adapter_takes_the_place_of_the_one_before_and_leaves_no_trace() {
    let ids = expected("llama")["ids.1"].clone();
    let (plain, all) = (open("llama"), AdapterFile::open(&fixture("llama/adapter")).unwrap());
    let mut few = AdapterFile::open(&fixture("llama/adapter")).unwrap();
    few.tensors.retain(|name, _| name.contains("layers.1.self_attn.q_proj"));
    assert_eq!(few.tensors.len(), 2);
    let after = |files: &[&AdapterFile]| {
        let mut model = open("llama");
        for file in files {
            attach_file(model.as_mut(), file, Use::Inference).unwrap();
        }
        (logits(model.as_ref(), &ids), model)
    };
    let ((first, _), (second, _), (both, mut model)) = (after(&[&all]), after(&[&few]), after(&[&all, &few]));
    assert!(first != second && second != logits(plain.as_ref(), &ids));
    assert_eq!(both, second);
    let mut other = AdapterFile::open(&fixture("llama/adapter")).unwrap();
    other.tensors.pop_first().unwrap();
    assert!(attach_file(model.as_mut(), &other, Use::Inference).is_err());
    assert_eq!(logits(model.as_ref(), &ids), second, "one that does not fit changes nothing");
    detach(model.as_mut()).unwrap();
    assert_eq!(logits(model.as_ref(), &ids), logits(plain.as_ref(), &ids));
}

#[test]
fn a_fresh_adapter_changes_nothing_and_starts_as_pefts_does() {
    let mut model = open("llama");
    let ids = expected("llama")["ids.1"].clone();
    let before = logits(model.as_ref(), &ids);
    let config = LoraConfig { r: 8, ..LoraConfig::default() };
    let arena = attach(model.as_mut(), &config, 1).unwrap();
    assert_eq!(before, logits(model.as_ref(), &ids));
    let model_layers = model.spec().num_hidden_layers();
    assert_eq!(arena.params().count(), model_layers * 7 * 2);
    for param in arena.params().filter(|p| p.name().ends_with("lora_A.weight")) {
        // uniform in ±1/sqrt(in): mean 0, variance bound²/3
        let values: Vec<f32> = param.master().flatten_all().unwrap().to_vec1().unwrap();
        let bound = 1.0 / (param.master().dims()[1] as f32).sqrt();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!(values.iter().all(|x| x.abs() <= bound), "{}", param.name());
        assert!(mean.abs() < 0.2 * bound, "{}: mean {mean}", param.name());
        assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.3, "{}: variance {variance}", param.name());
    }
}

#[test]
fn targets_by_name_and_names_that_match_nothing() {
    let mut model = open("llama");
    let names =
        |list: &str| LoraConfig { target_modules: list.parse::<TargetModules>().unwrap(), ..Default::default() };
    let arena = attach(model.as_mut(), &names("q_proj,layers.1.mlp.up_proj"), 1).unwrap();
    let layers = model.spec().num_hidden_layers();
    assert_eq!(arena.params().count(), (layers + 1) * 2);
    let error = attach(model.as_mut(), &names("q_proj,query"), 1).err().unwrap().to_string();
    assert!(error.contains("called query") && error.contains("gate_proj"), "{error}");
}

#[test]
fn an_adapter_that_does_not_fit_is_refused() {
    let open_adapter = || AdapterFile::open(&fixture("llama/adapter")).unwrap();
    let refused = |file: &AdapterFile, reason: &str| {
        let error = attach_file(open("llama").as_mut(), file, Use::Inference).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let mut file = open_adapter();
    file.tensors.remove("model.layers.0.self_attn.q_proj.lora_B.weight").unwrap();
    refused(&file, "q_proj.lora_B.weight is missing");

    let mut file = open_adapter();
    let tensor = file.tensors["model.layers.0.self_attn.q_proj.lora_A.weight"].clone();
    file.tensors.insert("model.layers.9.self_attn.q_proj.lora_A.weight".into(), tensor.clone());
    refused(&file, "no layer for model.layers.9");

    let mut file = open_adapter();
    file.tensors
        .insert("model.layers.0.self_attn.q_proj.lora_A.weight".into(), tensor.t().unwrap().contiguous().unwrap());
    refused(&file, "this model needs");
}

#[test]
fn what_is_no_adapter_says_so() {
    let error = |path: PathBuf| AdapterFile::open(&path).err().unwrap().to_string();
    assert!(error(fixture("nothing-here")).contains("is no adapter"));
    assert!(error(fixture("llama")).contains("is no adapter"));
    assert!(error(fixture("llama/model.safetensors")).contains("is no adapter"));
    let whole = fs::read(fixture("llama/adapter/adapter_model.safetensors")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("llama/adapter/adapter_config.json"), folder.path().join("adapter_config.json")).unwrap();
    for length in [0, 7, 100, whole.len() - 1] {
        fs::write(folder.path().join("adapter_model.safetensors"), &whole[..length]).unwrap();
        assert!(error(folder.path().into()).contains("adapter_model.safetensors"), "{length}");
    }
}
