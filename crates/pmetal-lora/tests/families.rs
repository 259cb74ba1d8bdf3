//! Adapters of every family against PEFT: losses and gradients, old files and new, what is written. `tests/peft.rs` compares the logits.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, safetensors};
use pmetal_lora::{AdapterFile, Base, LoraConfig, SINGLE_FILE, Use, adapter_tensors, attach, attach_file, save};
use pmetal_models::{CausalLMModel, Checkpoint, Input, load};
use pmetal_ops::{Arena, gradients, linear_cross_entropy, no_grad, router_loss};
use serde_json::{Value, json};

/// A folder of `scripts/make-parity-fixtures.py`.
struct Fixture {
    name: String,
    path: PathBuf,
    checkpoint: Checkpoint,
    expected: HashMap<String, Tensor>,
}

impl Fixture {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pmetal-models/tests/fixtures").join(name);
        let expected = safetensors::load(path.join("expected.safetensors"), &Device::Cpu).unwrap();
        Self { name: name.into(), checkpoint: Checkpoint::open(&path).unwrap(), path, expected }
    }

    fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pmetal-models/tests/fixtures");
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert!(names.len() >= 50, "{names:?}");
        names.iter().map(|name| Self::open(name)).collect()
    }

    fn model(&self) -> Box<dyn CausalLMModel> {
        load(&self.checkpoint, DType::F32, &Device::Cpu, None).unwrap()
    }

    fn adapted(&self, adapter: &str) -> (AdapterFile, Box<dyn CausalLMModel>, Arena) {
        let (file, mut model) = (AdapterFile::open(&self.path.join(adapter)).unwrap(), self.model());
        let arena = attach_file(model.as_mut(), &file, Use::Training).unwrap().unwrap();
        (file, model, arena)
    }

    fn rows(&self) -> Vec<Vec<u32>> {
        let ids = |row| self.expected[&format!("ids.{row}")].to_vec1::<i64>().unwrap();
        (0..3).map(|row| ids(row).into_iter().map(|id| id as u32).collect()).collect()
    }

    /// What is written of an arena, read back.
    fn saved(&self, config: &LoraConfig, arena: &Arena) -> (tempfile::TempDir, AdapterFile) {
        let folder = tempfile::tempdir().unwrap();
        let text_module = self.checkpoint.text_module();
        save(folder.path(), config, Base { name: &self.name, spec: self.checkpoint.spec(), text_module }, arena)
            .unwrap();
        let file = AdapterFile::open(folder.path()).unwrap();
        (folder, file)
    }
}

fn logits(model: &dyn CausalLMModel, ids: &[u32]) -> Tensor {
    let hidden = no_grad(|| model.forward(&Input::rows(ids, &[ids.len()]), None)).unwrap();
    model.logits(hidden.tensor()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (values(got), values(want));
    let scale = want.iter().fold(1e-9f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= 1e-4 * scale, "{what}: differs by {worst:e} where the largest value is {scale:e}");
}

/// Backpropagates the fixture's loss, the routers' in it, and returns it.
fn loss(model: &dyn CausalLMModel, rows: &[Vec<u32>]) -> f32 {
    let (ids, lengths): (Vec<u32>, Vec<usize>) = (rows.concat(), rows.iter().map(Vec::len).collect());
    let labels: Vec<i64> = rows.iter().flat_map(|row| row[1..].iter().map(|&id| i64::from(id)).chain([-100])).collect();
    let scale = 1.0 / (ids.len() - rows.len()) as f32;
    let (hidden, routers) = model.forward_with_routers(&Input::rows(&ids, &lengths), None).unwrap();
    let entropy = linear_cross_entropy(&hidden, model.head(), &labels, scale, model.logits_spec()).unwrap();
    let one = |value: &pmetal_ops::Value| value.tensor().ones_like().unwrap();
    let mut total = entropy.loss.tensor().to_scalar::<f32>().unwrap();
    let mut roots = vec![(entropy.loss.clone(), one(&entropy.loss))];
    if let Some((coefficient, router)) = model.spec().router_loss.zip(model.spec().router()) {
        let balance = router_loss(&routers, router).unwrap();
        total += coefficient as f32 * balance.tensor().to_scalar::<f32>().unwrap();
        let weight = (one(&balance) * coefficient).unwrap();
        roots.push((balance, weight));
    }
    gradients(roots, &[]).unwrap();
    total
}

/// A name in a file, without what PEFT and models of several parts put before it.
fn plain(name: &str) -> String {
    let name = name.strip_prefix("base_model.model.").unwrap();
    let text = name.strip_prefix("model.language_model.").map(|rest| format!("model.{rest}"));
    text.unwrap_or_else(|| name.strip_prefix("language_model.").unwrap_or(name).to_owned())
}

#[test]
fn losses_and_gradients_in_the_files_own_layout() {
    for fixture in Fixture::all() {
        let (file, model, arena) = fixture.adapted("adapter");
        let (got, want) = (loss(model.as_ref(), &fixture.rows()), fixture.expected["loss"].to_scalar::<f32>().unwrap());
        assert!((got - want).abs() <= 1e-5 * want, "{}: loss {got}, wanted {want}", fixture.name);
        let grads: Vec<_> = arena.params().map(|param| param.grad().unwrap().copy().unwrap()).collect();
        arena.params().zip(&grads).for_each(|(param, grad)| param.set(grad).unwrap());
        let (_folder, written) = fixture.saved(&file.config, &arena);
        let want: BTreeMap<String, &Tensor> =
            fixture.expected.iter().filter_map(|(name, t)| Some((plain(name.strip_prefix("grad.")?), t))).collect();
        assert!(written.tensors.keys().eq(want.keys()), "{}", fixture.name);
        for (name, grad) in &written.tensors {
            assert_close(grad, want[name], &format!("{} {name}", fixture.name));
        }
    }
}

#[test]
fn what_is_saved_reads_back_bit_by_bit() {
    for fixture in Fixture::all() {
        let (file, model, arena) = fixture.adapted("adapter");
        let (folder, again) = fixture.saved(&file.config, &arena);
        for again in [again, AdapterFile::open(&folder.path().join(SINGLE_FILE)).unwrap()] {
            assert!(again.tensors.keys().eq(file.tensors.keys()), "{}", fixture.name);
            for (name, tensor) in &again.tensors {
                assert_eq!(values(tensor), values(&file.tensors[name]), "{} {name}", fixture.name);
            }
            let mut same = fixture.model();
            attach_file(same.as_mut(), &again, Use::Inference).unwrap();
            for ids in fixture.rows() {
                let (want, got) = (logits(model.as_ref(), &ids), logits(same.as_ref(), &ids));
                assert_eq!(values(&want), values(&got), "{}", fixture.name);
            }
        }
    }
}

#[test]
fn adapters_of_experts_that_were_modules_of_their_own() {
    const ADAPTER: &str = "adapter-per-expert";
    let fixtures: Vec<_> = Fixture::all().into_iter().filter(|fixture| fixture.path.join(ADAPTER).is_dir()).collect();
    assert!(!fixtures.is_empty());
    for fixture in fixtures {
        let (file, model, arena) = fixture.adapted(ADAPTER);
        let (_folder, together) = fixture.saved(&file.config, &arena);
        let mut as_saved = fixture.model();
        attach_file(as_saved.as_mut(), &together, Use::Inference).unwrap();
        for (row, ids) in fixture.rows().iter().enumerate() {
            let want = &fixture.expected[&format!("per_expert_logits.{row}")];
            assert_close(&logits(model.as_ref(), ids), want, &fixture.name);
            assert_close(&logits(as_saved.as_ref(), ids), want, &fixture.name);
        }
        for name in
            ["1.mlp.experts.2.up_proj.lora_B", "1.mlp.experts.2.gate_proj.lora_A", "0.mlp.experts.0.down_proj.lora_A"]
        {
            let (mut file, name) =
                (AdapterFile::open(&fixture.path.join(ADAPTER)).unwrap(), format!("model.layers.{name}.weight"));
            file.tensors.remove(&name).unwrap();
            let error = attach_file(fixture.model().as_mut(), &file, Use::Inference).err().unwrap().to_string();
            assert!(error.contains(&format!("{name} is missing")), "{error}");
        }
        let mut file = AdapterFile::open(&fixture.path.join(ADAPTER)).unwrap();
        file.tensors.retain(|name, _| !name.contains("layers.1.mlp.experts.3."));
        let error = attach_file(fixture.model().as_mut(), &file, Use::Training).err().unwrap().to_string();
        assert!(error.contains("layers.1.mlp.experts.3.gate_up_proj.lora_A.weight is missing"), "{error}");
    }
}

/// Mixtral's had names of their own: the product of the joined matrices is that of gate above that of up.
#[test]
fn old_names_of_gate_up_and_down() {
    let (fixture, r) = (Fixture::open("mixtral-hub"), 3);
    let mut file = AdapterFile::open(&fixture.path.join("adapter")).unwrap();
    (file.tensors, file.config) = (BTreeMap::new(), LoraConfig { r, ..LoraConfig::default() });
    for (seed, (part, rows, columns)) in [("w1", 20, 32), ("w3", 20, 32), ("w2", 32, 20)].into_iter().enumerate() {
        for expert in 0..5 {
            for (side, shape) in [("A", (r, columns)), ("B", (rows, r))] {
                let values =
                    (0..shape.0 * shape.1).map(|i| ((i * 7 + expert * 3 + seed * 5) % 11) as f32 - 5.0).collect();
                let name = format!("model.layers.1.block_sparse_moe.experts.{expert}.{part}.lora_{side}.weight");
                file.tensors.insert(name, Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu).unwrap());
            }
        }
    }
    let joined = file.for_model(fixture.checkpoint.spec()).unwrap();
    let product = |tensors: &BTreeMap<String, Tensor>, module: &str| {
        let side = |side: &str| tensors[&format!("model.layers.1.{module}.lora_{side}.weight")].clone();
        side("B").matmul(&side("A")).unwrap()
    };
    for expert in 0..5 {
        let old = |part: &str| product(&file.tensors, &format!("block_sparse_moe.experts.{expert}.{part}"));
        let new = |part: &str| product(&joined, &format!("mlp.experts.{expert}.{part}"));
        let gate_up = Tensor::cat(&[old("w1"), old("w3")], 0).unwrap();
        assert_eq!(values(&new("gate_up_proj")), values(&gate_up));
        assert_eq!(values(&new("down_proj")), values(&old("w2")));
    }
    assert_eq!(joined.len(), 5 * 4);
    attach_file(fixture.model().as_mut(), &file, Use::Inference).unwrap();
}

#[test]
fn text_parts_are_called_as_in_the_class_that_transformers_loads() {
    for (name, prefix) in [
        ("gemma3-hub", "base_model.model.model.language_model.layers."),
        ("gemma3-text", "base_model.model.model.layers."),
        ("llama4-hub", "base_model.model.model.layers."),
    ] {
        let fixture = Fixture::open(name);
        let (file, _, arena) = fixture.adapted("adapter");
        let (folder, _) = fixture.saved(&file.config, &arena);
        let tensors = safetensors::load(folder.path().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        assert!(tensors.keys().all(|name| name.starts_with(prefix)), "{name}");
    }
}

/// `adapter_config.json` of a fresh adapter.
fn config_of(fixture: &Fixture, config: &LoraConfig) -> (Value, Arena) {
    let mut model = fixture.model();
    let arena = attach(model.as_mut(), config, 3).unwrap();
    let names: Vec<_> = arena.params().map(|p| (p.name().to_owned(), p.master().shape().clone())).collect();
    let mut expected = adapter_tensors(fixture.checkpoint.spec(), config).unwrap();
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    let mut sorted = names.clone();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(sorted, expected, "{}", fixture.name);
    let (folder, again) = fixture.saved(config, &arena);
    attach_file(fixture.model().as_mut(), &again, Use::Inference).unwrap();
    (serde_json::from_slice(&fs::read(folder.path().join("adapter_config.json")).unwrap()).unwrap(), arena)
}

fn targets(list: &str) -> LoraConfig {
    LoraConfig { r: 3, lora_alpha: 6.0, target_modules: list.parse().unwrap(), ..Default::default() }
}

#[test]
fn fresh_adapters_change_nothing_and_start_within_pefts_bounds() {
    for fixture in Fixture::all() {
        let (mut model, ids) = (fixture.model(), &fixture.rows()[0]);
        let before = logits(model.as_ref(), ids);
        let arena = attach(model.as_mut(), &targets("all-linear"), 1).unwrap();
        assert_eq!(values(&before), values(&logits(model.as_ref(), ids)), "{}", fixture.name);
        let (_folder, written) = fixture.saved(&targets("all-linear"), &arena);
        for (name, tensor) in &written.tensors {
            let (values, [_, width]) = (values(tensor), tensor.dims()) else { panic!("{name}") };
            if name.ends_with("lora_B.weight") {
                assert!(values.iter().all(|&x| x == 0.0), "{} {name}", fixture.name);
                continue;
            }
            let bound = 1.0 / (*width as f32).sqrt();
            let largest = values.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(largest <= bound && largest > 0.7 * bound, "{} {name}: {largest} of {bound}", fixture.name);
        }
    }
}

#[test]
fn all_linear_layers_of_experts_as_peft_is_told_of_them() {
    let experts = |module: &str| json!([format!("{module}.gate_up_proj"), format!("{module}.down_proj")]);
    let attention = json!(["q_proj", "k_proj", "v_proj", "o_proj"]);
    for (name, modules, parameters, doubled) in [
        ("qwen3-moe", attention.clone(), experts("mlp.experts"), true),
        ("mixtral-hub", attention.clone(), experts("mlp.experts"), true),
        ("gpt-oss", attention.clone(), experts("mlp.experts"), false),
        ("granitemoe", attention, experts("block_sparse_moe.experts"), false),
    ] {
        let (config, _) = config_of(&Fixture::open(name), &targets("all-linear"));
        assert_eq!((&config["target_modules"], &config["target_parameters"]), (&modules, &parameters), "{name}");
        let pattern = |number: u64| if doubled { json!({ r".*\.gate_up_proj": number }) } else { json!({}) };
        assert_eq!((&config["rank_pattern"], &config["alpha_pattern"]), (&pattern(6), &pattern(12)), "{name}");
    }
    // modules called as experts once were would be taken for experts
    let (config, arena) = config_of(&Fixture::open("deepseek-v3"), &targets("all-linear"));
    let has = |name: &str| config["target_parameters"].as_array().unwrap().contains(&json!(name));
    assert!(has("mlp.experts.down_proj") && has("mlp.shared_experts.up_proj.weight"), "{config}");
    assert!(has("mlp.gate_proj.weight"), "{config}");
    assert!(arena.param("model.layers.0.mlp.gate_proj.lora_A.weight").is_some());
    // no gradient reaches what picks keys
    let (_, arena) = config_of(&Fixture::open("deepseek-v32"), &targets("all-linear"));
    assert!(arena.params().all(|param| !param.name().contains("indexer")));
}

#[test]
fn names_stand_for_what_they_stand_for_in_peft() {
    let named = |fixture: &str, list: &str| {
        let (config, arena) = config_of(&Fixture::open(fixture), &targets(list));
        let mut modules: Vec<String> = arena.params().map(|p| p.name().to_owned()).collect();
        modules.retain(|name| name.ends_with("lora_A.weight"));
        (config, modules)
    };
    // the experts' alone, where each was a module of its own; dense and shared ones have the same names
    let (config, modules) = named("deepseek-v3", "gate_proj,up_proj,down_proj");
    assert!(modules.iter().all(|name| name.contains(".mlp.experts.")), "{modules:?}");
    assert_eq!((&config["target_modules"], &config["rank_pattern"]), (&json!([]), &json!({ r".*\.gate_up_proj": 6 })));
    let (_, modules) = named("mixtral-hub", "w1,w2,w3");
    assert!(modules.iter().any(|name| name.ends_with("experts.4.gate_up_proj.lora_A.weight")), "{modules:?}");
    let (config, modules) = named("qwen3-moe", "gate_up_proj");
    assert!(modules.iter().all(|name| name.contains(".gate_up_proj.")), "{modules:?}");
    assert_eq!(config["rank_pattern"], json!({}));
    // elsewhere modules, where there are any
    let (_, modules) = named("llama4-text", "down_proj");
    assert!(modules.iter().all(|name| !name.contains(".experts.")), "{modules:?}");
    let (config, _) = named("llama4-text", "experts.gate_up_proj");
    assert_eq!(config["target_parameters"], json!(["feed_forward.experts.gate_up_proj"]));
    let (config, _) = named("llama4-text", "experts.down_proj");
    assert_eq!(config["target_parameters"], json!(["feed_forward.experts.down_proj"]));
    let (config, _) = named("phi3-window-hub", "qkv_proj,gate_up_proj");
    assert_eq!(config["target_modules"], json!(["qkv_proj", "gate_up_proj"]));
    let refused = |list: &str| attach(Fixture::open("qwen3-moe").model().as_mut(), &targets(list), 1).err().unwrap();
    let error = refused("q_proj,query").to_string();
    assert!(error.contains("called query") && error.contains("gate_up_proj, down_proj, gate_proj, up_proj"), "{error}");
    assert!(refused("gate_proj").to_string().contains("both gate and up or neither"));
}

#[test]
fn tensors_of_experts_that_are_none_of_this_model() {
    let fixture = Fixture::open("gpt-oss");
    let refused = |change: &dyn Fn(&mut AdapterFile), reason: &str| {
        let mut file = AdapterFile::open(&fixture.path.join("adapter")).unwrap();
        change(&mut file);
        let error = attach_file(fixture.model().as_mut(), &file, Use::Training).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let name = "model.layers.0.mlp.experts.base_layer.lora_A.weight";
    refused(&|file| drop(file.tensors.insert(name.into(), file.tensors[name].narrow(0, 0, 7).unwrap())), "4 experts");
    refused(&|file| drop(file.tensors.insert(name.into(), file.tensors[name].flatten_all().unwrap())), "a matrix");
    refused(
        &|file| drop(file.tensors.insert(name.into(), file.tensors[name].narrow(0, 0, 4).unwrap())),
        "needs [2, 32]",
    );
    refused(&|file| drop(file.tensors.remove(name)), "is missing");
    let extra = |name: &'static str| {
        move |file: &mut AdapterFile| {
            drop(file.tensors.insert(name.into(), Tensor::zeros((2, 32), DType::F32, &Device::Cpu).unwrap()))
        }
    };
    refused(&extra("model.layers.5"), "no layer for model.layers.5");
    refused(&extra("model.layers.0.mlp.experts.9.down_proj.lora_A.weight"), "no layer for");
    refused(&|file| file.config.r = 1, "needs [1, 32]");
}
