//! A Hugging Face folder, its experts in whatever form the family's files have them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, IndexOp, Tensor};
use serde_json::Value;

pub struct Checkpoint {
    pub config: Value,
    pub tensors: HashMap<String, Tensor>,
}

/// The names of the pieces, and what they make.
type Made = Option<(Vec<String>, Tensor)>;

impl Checkpoint {
    pub fn open(name: &str) -> Self {
        let path = folder(name);
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(&path).unwrap() {
            let file = entry.unwrap().path();
            if file.file_name().unwrap().to_str().unwrap().starts_with("model")
                && file.extension().is_some_and(|extension| extension == "safetensors")
            {
                tensors.extend(candle_core::safetensors::load(file, &Device::Cpu).unwrap());
            }
        }
        let config = std::fs::read_to_string(path.join("config.json")).unwrap();
        Self { config: serde_json::from_str(&config).unwrap(), tensors }
    }

    /// What a weight should be, in f32; the names it is made of go into `used`.
    pub fn wanted(&self, name: &str, used: &mut HashSet<String>) -> Tensor {
        let made = self.whole(name).or_else(|| self.experts(name));
        let (names, tensor) = made.unwrap_or_else(|| panic!("the checkpoint has nothing for {name}"));
        used.extend(names);
        tensor
    }

    fn whole(&self, name: &str) -> Made {
        Some((vec![name.to_string()], self.get(name)?))
    }

    fn experts(&self, name: &str) -> Made {
        let (module, rest) = name.split_once(".experts.")?;
        let (part, suffix) = rest.split_once('.')?;
        let bias = suffix == "bias";
        self.one_by_one(module, part)
            .or_else(|| self.two_linears(module, part))
            .or_else(|| self.transposed(module, part, bias))
            .or_else(|| self.microscaled(module, part))
    }

    /// A tensor for each expert: Qwen, DeepSeek, and Mixtral under other names.
    fn one_by_one(&self, module: &str, part: &str) -> Made {
        let other = match part {
            "gate_proj" => "w1",
            "down_proj" => "w2",
            _ => "w3",
        };
        let name = |expert: usize, part: &str| format!("{module}.experts.{expert}.{part}.weight");
        let part = [part, other].into_iter().find(|part| self.tensors.contains_key(&name(0, part)))?;
        let names: Vec<_> =
            (0..).map(|expert| name(expert, part)).take_while(|name| self.tensors.contains_key(name)).collect();
        let experts: Vec<_> = names.iter().map(|name| self.get(name).unwrap()).collect();
        Some((names, Tensor::stack(&experts, 0).unwrap()))
    }

    /// Granite: gate above up, each expert a linear layer.
    fn two_linears(&self, module: &str, part: &str) -> Made {
        let linear = if part == "down_proj" { "output_linear" } else { "input_linear" };
        let name = format!("{module}.{linear}.weight");
        let stored = self.get(&name)?;
        let tensor = if part == "down_proj" { stored } else { half_of(&stored, part) };
        Some((vec![name], tensor))
    }

    /// Transposed linear layers: Llama 4 with halves, GPT-OSS, the one with biases, with alternate columns.
    fn transposed(&self, module: &str, part: &str, bias: bool) -> Made {
        let fused = if part == "down_proj" { part } else { "gate_up_proj" };
        let name = format!("{module}.experts.{fused}{}", if bias { "_bias" } else { "" });
        let stored = self.get(&name)?;
        let rows = if bias { stored } else { stored.transpose(1, 2).unwrap() };
        let alternate = self.tensors.contains_key(&format!("{module}.experts.{fused}_bias"));
        let tensor = match part {
            "down_proj" => rows,
            _ if alternate => every_other(&rows, part),
            _ => half_of(&rows, part),
        };
        Some((vec![name], tensor))
    }

    /// GPT-OSS as it is published: byte `k` of a block holds numbers `2k` and `2k + 1`, in its low and high half.
    fn microscaled(&self, module: &str, part: &str) -> Made {
        let fused = if part == "down_proj" { part } else { "gate_up_proj" };
        let names = ["blocks", "scales"].map(|end| format!("{module}.experts.{fused}_{end}"));
        let [blocks, scales] = names.each_ref().map(|name| self.tensors.get(name));
        let (experts, rows, groups, bytes) = blocks?.dims4().unwrap();
        let numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let number = |code: u8| if code < 8 { numbers[usize::from(code)] } else { -numbers[usize::from(code - 8)] };
        let blocks: Vec<u8> = blocks?.flatten_all().unwrap().to_vec1().unwrap();
        let scales: Vec<u8> = scales?.flatten_all().unwrap().to_vec1().unwrap();
        let decoded = blocks.chunks(bytes).zip(scales).flat_map(|(block, scale)| {
            let scale = 2_f32.powi(i32::from(scale) - 127);
            block.iter().flat_map(move |byte| [byte & 15, byte >> 4]).map(move |code| number(code) * scale)
        });
        let shape = (experts, rows, groups * bytes * 2);
        let tensor = Tensor::from_vec(decoded.collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap();
        Some((names.to_vec(), if part == "down_proj" { tensor } else { every_other(&tensor, part) }))
    }

    fn get(&self, name: &str) -> Option<Tensor> {
        Some(self.tensors.get(name)?.to_dtype(DType::F32).unwrap())
    }
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pmetal-models/tests/fixtures").join(name)
}

/// Gate's or up's half of the rows.
fn half_of(rows: &Tensor, part: &str) -> Tensor {
    let half = rows.dim(1).unwrap() / 2;
    rows.narrow(1, if part == "gate_proj" { 0 } else { half }, half).unwrap()
}

/// Gate's rows are the even ones, up's the odd ones.
fn every_other(rows: &Tensor, part: &str) -> Tensor {
    let first = u32::from(part != "gate_proj");
    let places: Vec<u32> = (first..rows.dim(1).unwrap() as u32).step_by(2).collect();
    let places = Tensor::from_vec(places.clone(), places.len(), &Device::Cpu).unwrap();
    rows.contiguous().unwrap().index_select(&places, 1).unwrap()
}

pub fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Part `index` along the outermost dimension.
pub fn part(tensor: &Tensor, index: usize) -> Tensor {
    tensor.i(index).unwrap()
}
