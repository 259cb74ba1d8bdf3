//! Adapter files: PEFT's folder, and the same in a single file.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use pmetal_core::StagedDir;
use pmetal_ops::Arena;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::{Error, LoraConfig, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// The single file that holds tensors and settings.
pub const SINGLE_FILE: &str = "lora_weights.safetensors";
/// What PEFT puts before the model's own names.
const PREFIX: &str = "base_model.model.";
/// Where a single file's metadata has the settings.
const METADATA_KEY: &str = "adapter_config";

/// An adapter read from disk.
pub struct AdapterFile {
    /// Where it was read.
    pub path: PathBuf,
    /// Its settings.
    pub config: LoraConfig,
    /// The base model it records, empty where it records none.
    pub base: String,
    /// Tensors by name without PEFT's prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`, f32.
    pub tensors: BTreeMap<String, Tensor>,
}

impl AdapterFile {
    /// Reads a PEFT folder or a single file.
    pub fn open(path: &Path) -> Result<Self> {
        let not_an_adapter = || Error::NotAnAdapter { path: path.to_path_buf(), found: found_at(path) };
        if path.is_file() {
            let bytes = read(path)?;
            let json = single_file_config(path, &bytes)?.ok_or_else(not_an_adapter)?;
            return Self::parse(path, &json, path, &bytes);
        }
        let (config, weights) = (path.join(CONFIG), path.join(WEIGHTS));
        if config.is_file() && weights.is_file() {
            let json: Value = serde_json::from_slice(&read(&config)?)
                .map_err(|e| Error::broken(&config, format!("is no JSON: {e}; restore the adapter's own file")))?;
            return Self::parse(&config, &json, &weights, &read(&weights)?);
        }
        if path.join(SINGLE_FILE).is_file() {
            return Self::open(&path.join(SINGLE_FILE));
        }
        Err(not_an_adapter())
    }

    fn parse(config_path: &Path, json: &Value, weights_path: &Path, bytes: &[u8]) -> Result<Self> {
        let config = LoraConfig::from_peft(json, config_path)?;
        let base = json.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or("").to_owned();
        let file = SafeTensors::deserialize(bytes).map_err(|e| not_whole(weights_path, bytes, &e))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let tensor = read_tensor(&view).ok_or_else(|| {
                Error::broken(
                    weights_path,
                    format!(
                        "{name} is {:?}, expected f32, f16 or bf16; save the adapter in one of these",
                        view.dtype()
                    ),
                )
            })??;
            tensors.insert(name.strip_prefix(PREFIX).unwrap_or(&name).to_owned(), tensor);
        }
        tracing::debug!(path = %weights_path.display(), base, r = config.r, tensors = tensors.len(), "opened adapter");
        Ok(Self { path: weights_path.to_path_buf(), config, base, tensors })
    }
}

/// What stands where an adapter should, and what to do.
fn found_at(path: &Path) -> &'static str {
    let has = |name: &str| path.join(name).is_file();
    if !path.exists() {
        "there is nothing: check the path"
    } else if path.is_file() {
        "the file has no adapter's settings in its metadata: give the adapter's folder"
    } else if has("adapters.safetensors") {
        "it is one of mlx-lm, which is not read: convert it to PEFT's format"
    } else if has("adapter_model.bin") {
        "it has adapter_model.bin, a pickle, which is never read: save it as safetensors"
    } else if has(CONFIG) {
        "adapter_model.safetensors is missing: fetch the adapter again"
    } else if has(WEIGHTS) {
        "adapter_config.json is missing: fetch the adapter again"
    } else if has("config.json") {
        "it is a model: give it as --model"
    } else {
        "it has none of these: check the path"
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    Ok(fs::read(path).map_err(pmetal_core::Error::io("read", path))?)
}

fn not_whole(path: &Path, bytes: &[u8], error: &safetensors::SafeTensorError) -> Error {
    Error::broken(
        path,
        match pmetal_core::what_it_is(bytes) {
            Some(kind) => format!("is no safetensors file but {kind}"),
            None => format!("is truncated, or no safetensors file: {error}; fetch or train the adapter again"),
        },
    )
}

fn single_file_config(path: &Path, bytes: &[u8]) -> Result<Option<Value>> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| not_whole(path, bytes, &e))?;
    let Some(text) = metadata.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)) else { return Ok(None) };
    serde_json::from_str(text).map(Some).map_err(|e| Error::broken(path, format!("settings in its metadata: {e}")))
}

fn read_tensor(view: &TensorView) -> Option<Result<Tensor>> {
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => return None,
    };
    let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu);
    Some(tensor.and_then(|t| t.to_dtype(DType::F32)).map_err(Error::from))
}

/// Writes the adapter in `arena` to the folder `dir`: PEFT's two files, and the single file. The folder appears whole.
///
/// `base` is the model as the user named it.
pub fn save(dir: &Path, config: &LoraConfig, base: &str, arena: &Arena) -> Result<()> {
    let staged = StagedDir::new(dir)?;
    let mut modules = Vec::new();
    let mut tensors = Vec::new();
    for param in arena.params() {
        if let Some(module) = param.name().strip_suffix(".lora_A.weight") {
            modules.push(module.to_owned());
        }
        let data: Vec<f32> = param.master().flatten_all()?.to_vec1()?;
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((format!("{PREFIX}{}", param.name()), param.master().dims().to_vec(), bytes));
    }
    let json = config.to_peft(base, &modules);
    let views = || {
        tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(|e| Error::broken(dir, e))?;
            Ok((name.as_str(), view))
        })
    };
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut with_config = format.clone();
    with_config.insert(METADATA_KEY.into(), json.to_string());
    for (name, metadata) in [(WEIGHTS, format), (SINGLE_FILE, with_config)] {
        let views = views().collect::<Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::broken(dir, e))?;
        write(&staged.path().join(name), &bytes)?;
    }
    let text = serde_json::to_string_pretty(&json).map_err(|e| Error::broken(dir, e))?;
    write(&staged.path().join(CONFIG), text.as_bytes())?;
    Ok(staged.commit()?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(fs::write(path, bytes).map_err(pmetal_core::Error::io("write", path))?)
}
