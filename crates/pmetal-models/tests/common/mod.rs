//! The fixtures that `scripts/make-parity-fixtures.py` made with transformers and PEFT.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use candle_core::{DType, Device, Tensor};
use pmetal_models::{CausalLMModel, Checkpoint, Checkpointing, Input, load};
use pmetal_ops::{Adapter, Arena, Weight, device};

/// One folder of fixtures and what transformers computed with it.
pub struct Fixture {
    pub name: String,
    pub path: PathBuf,
    pub expected: HashMap<String, Tensor>,
}

impl Fixture {
    pub fn open(name: &str) -> Self {
        let path = folder().join(name);
        let expected = tensors(&path.join("expected.safetensors"));
        Self { name: name.into(), path, expected }
    }

    /// Those with plain adapters.
    pub fn with_plain_adapters() -> Vec<Self> {
        Self::all().into_iter().filter(Self::has_plain_adapter).collect()
    }

    /// Whether the adapter is a pair of matrices for each linear layer, under the layer's name. Adapters of experts, and of text parts, are pmetal-lora's.
    pub fn has_plain_adapter(&self) -> bool {
        let adapter = tensors(&self.path.join("adapter/adapter_model.safetensors"));
        adapter.keys().all(|name| !name.contains(".experts.") && !name.contains("language_model"))
    }

    /// All of them.
    pub fn all() -> Vec<Self> {
        let mut names: Vec<String> =
            fs::read_dir(folder()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert!(names.len() >= 12, "{names:?}");
        names.iter().map(|name| Self::open(name)).collect()
    }

    pub fn model(&self, dtype: DType, trainable: Option<&Arena>) -> Box<dyn CausalLMModel> {
        self.model_on(&Device::Cpu, dtype, trainable)
    }

    pub fn model_on(&self, device: &Device, dtype: DType, trainable: Option<&Arena>) -> Box<dyn CausalLMModel> {
        load(&Checkpoint::open(&self.path).unwrap(), dtype, device, trainable).unwrap()
    }

    pub fn rows(&self) -> Vec<Vec<u32>> {
        (0..3).map(|i| self.ids(&format!("ids.{i}"))).collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.expected[name].to_vec1::<i64>().unwrap().iter().map(|&id| id as u32).collect()
    }
}

/// Where a test binary that carries its fixtures has unpacked them.
pub static UNPACKED: OnceLock<PathBuf> = OnceLock::new();

fn folder() -> PathBuf {
    UNPACKED.get().cloned().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"))
}

pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// The logits of rows that lie behind one another, row by row.
pub fn packed_logits(
    model: &dyn CausalLMModel,
    rows: &[Vec<u32>],
    checkpointing: Option<Checkpointing>,
) -> Vec<Tensor> {
    let (ids, q_lens) = pack(rows);
    let input = Input { checkpointing, ..Input::rows(&ids, &q_lens) };
    let logits = model.logits(model.forward(&input, None).unwrap().tensor()).unwrap();
    let mut start = 0;
    let of_row = |&len: &usize| {
        let row = logits.narrow(0, start, len).unwrap();
        start += len;
        row
    };
    q_lens.iter().map(of_row).collect()
}

pub fn pack(rows: &[Vec<u32>]) -> (Vec<u32>, Vec<usize>) {
    (rows.concat(), rows.iter().map(Vec::len).collect())
}

/// The next token of every token but the last of its row.
pub fn labels(rows: &[Vec<u32>]) -> Vec<i64> {
    rows.iter().flat_map(|row| row[1..].iter().map(|&id| i64::from(id)).chain([-100])).collect()
}

/// Puts a PEFT folder on the model by hand; its tensors go to the arena that is returned, under the names in the file.
pub fn adapt(model: &mut dyn CausalLMModel, folder: &Path) -> Arena {
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    let (alpha, r) = (config["lora_alpha"].as_f64().unwrap(), config["r"].as_f64().unwrap());
    let scale = if config["use_rslora"] == true { alpha / r.sqrt() } else { alpha / r };
    let tensors = tensors(&folder.join("adapter_model.safetensors"));
    let shapes: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t.shape().clone())).collect();
    let dtype = device::trained_dtype(&model.device(), model.dtype());
    let arena = Arena::new(&shapes, dtype, &model.device()).unwrap();
    for (name, tensor) in &tensors {
        arena.param(name).unwrap().set(tensor).unwrap();
    }
    let mut place = 0;
    model
        .for_each_linear(&mut |module, member| {
            let weight = |side: &str| {
                let name = format!("base_model.model.{module}.lora_{side}.weight");
                arena.param(&name).map(Weight::Trainable)
            };
            if let Some((a, b)) = weight("A").zip(weight("B")) {
                member.adapter = Some(Adapter { a, b, scale: scale as f32, dropout: 0.0, place });
                place += 1;
            }
        })
        .unwrap();
    assert_eq!(place as usize * 2, tensors.len());
    arena
}

/// The largest difference over the largest value wanted.
pub fn relative_error(want: &Tensor, got: &Tensor) -> f64 {
    assert_eq!(want.dims(), got.dims());
    let read = |t: &Tensor| {
        t.to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()
    };
    let (want, got) = (read(want), read(got));
    assert!(got.iter().all(|x| x.is_finite()));
    let largest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    worst / largest.max(1e-12)
}

pub fn assert_close(want: &Tensor, got: &Tensor, tolerance: f64, what: &str) {
    let error = relative_error(want, got);
    assert!(error <= tolerance, "{what}: relative error {error:e}, allowed {tolerance:e}");
}

/// torch's gradient of a weight; that of an expert is a part of transformers' for all of them.
pub fn full_gradient(fixture: &Fixture, name: &str) -> Tensor {
    let Some((layer, part)) = name.split_once(".experts.") else {
        return fixture.expected[&format!("full_grad.{name}")].clone();
    };
    let [expert, matrix, kind] = part.split('.').collect::<Vec<_>>()[..] else { panic!("{name}") };
    let bias = if kind == "bias" { "_bias" } else { "" };
    let all = &fixture.expected[&format!("full_grad.{layer}.experts.{matrix}{bias}")];
    let one = all.get(expert.parse().unwrap()).unwrap();
    if !fixture.name.starts_with("gpt-oss") {
        return one;
    }
    // there gates and ups take turns along the last dimension
    let one = if kind == "bias" { one } else { one.t().unwrap().contiguous().unwrap() };
    if matrix == "down_proj" {
        return one;
    }
    let halves = |start: u32| {
        let rows: Vec<u32> = (start..one.dim(0).unwrap() as u32).step_by(2).collect();
        one.index_select(&Tensor::new(rows, one.device()).unwrap(), 0).unwrap()
    };
    Tensor::cat(&[halves(0), halves(1)], 0).unwrap()
}
