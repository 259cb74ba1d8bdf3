//! Adapter files: PEFT's folder, and the same in a single file.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use pmetal_models::{DecoderSpec, EMBEDDING, HEAD};
use pmetal_ops::{Arena, Param};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::{
    Error, LoraConfig, ModulesToSave, Result,
    experts::ExpertLayout,
    targets::{found, listed},
};

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
    /// Tensors as the file has them, by name without PEFT's prefix and without what a model of several parts calls its text part:
    /// `model.layers.0.self_attn.q_proj.lora_A.weight` and so on in f32, and the tables it carries, such as `model.embed_tokens.weight`, in
    /// their own dtype.
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

    /// The adapter's tensors by the names that a model's layers have: those of each expert, where the file has all experts' in one.
    ///
    /// # Errors
    /// Where tensors of experts have shapes that are none of this model's.
    pub fn for_model(&self, spec: &DecoderSpec) -> Result<BTreeMap<String, Tensor>> {
        match ExpertLayout::of(spec) {
            Some(experts) => experts.read(&self.tensors, &|reason| self.other_model(reason)),
            None => Ok(self.tensors.clone()),
        }
    }

    /// It is not for this model.
    pub(crate) fn other_model(&self, reason: String) -> Error {
        let base = if self.base.is_empty() { "an unnamed model".into() } else { self.base.clone() };
        Error::OtherModel { path: self.path.clone(), reason, base }
    }

    fn parse(config_path: &Path, json: &Value, weights_path: &Path, bytes: &[u8]) -> Result<Self> {
        let config = LoraConfig::from_peft(json, config_path)?;
        let base = json.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or("").to_owned();
        let file = SafeTensors::deserialize(bytes).map_err(|e| not_whole(weights_path, bytes, &e))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let Some(name) = plain_name(&name) else { continue };
            let tensor = read_tensor(&view, &name).ok_or_else(|| {
                let reason = format!(
                    "{name} is {:?}, expected f32, f16 or bf16; save the adapter in one of these",
                    view.dtype()
                );
                Error::broken(weights_path, reason)
            })??;
            tensors.insert(name, tensor);
        }
        if let Some(missing) = config.modules_to_save.tensors().find(|&name| !tensors.contains_key(name)) {
            let reason = format!("{missing} is missing, which modules_to_save of {} names", config_path.display());
            return Err(Error::broken(weights_path, reason));
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

/// A tensor's name without what PEFT puts around the model's own. None for the base's table that PEFT saves beside the one it trained,
/// where the vocabulary was resized.
fn plain_name(name: &str) -> Option<String> {
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    let in_text_part = |whole: &str, part: &str| name.strip_prefix(whole).map(|rest| format!("{part}{rest}"));
    let name = in_text_part("model.language_model.", "model.")
        .or_else(|| in_text_part("language_model.", ""))
        .unwrap_or_else(|| name.to_owned());
    (!name.contains(".original_module.")).then(|| name.replace(".modules_to_save.", "."))
}

fn read_tensor(view: &TensorView, name: &str) -> Option<Result<Tensor>> {
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => return None,
    };
    let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu);
    let kept = if [EMBEDDING, HEAD].contains(&name) { dtype } else { DType::F32 };
    Some(tensor.and_then(|t| t.to_dtype(kept)).map_err(Error::from))
}

/// What an adapter was trained on.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    /// The model as the user named it.
    pub name: &'a str,
    /// Its decoder.
    pub spec: &'a DecoderSpec,
    /// What comes before the names of the decoder's layers and of its embedding in place of `model.`, where it is a part of a larger model: see
    /// [`pmetal_models::Checkpoint::text_module`].
    pub text_module: Option<&'a str>,
}

impl Base<'_> {
    /// What PEFT calls a module or tensor of the decoder.
    fn outside(&self, name: &str) -> String {
        let inner = self.text_module.zip(name.strip_prefix("model."));
        inner.map_or_else(|| name.to_owned(), |(module, rest)| format!("{module}{rest}"))
    }
}

/// Writes the adapter in `arena` into the folder `dir`, which is there: PEFT's two files, and the single file.
///
/// Where the model's head is its embedding, a trained embedding is saved as both, for PEFT gives the head a copy of its own.
pub fn save(dir: &Path, config: &LoraConfig, base: Base, arena: &Arena) -> Result<()> {
    let tied = base.spec.tie_word_embeddings;
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    let mut tables = ModulesToSave::default();
    for param in arena.params() {
        let tensor = saved(&param).to_device(&Device::Cpu)?;
        let mut add = |name: &str| {
            tables.add(name.trim_end_matches(".weight"));
            tensors.push((name.to_owned(), tensor.clone()));
        };
        add(param.name());
        if tied && param.name() == EMBEDDING {
            add(HEAD);
        }
    }
    let targets = found(base.spec, config, |[a, _]| arena.param(a).map(|a| a.master().dims()[0]))?;
    let outside = |name: &str| base.outside(name);
    let listed = listed(base.spec, config, &targets, base.text_module.is_some().then_some(&outside))?;
    if let Some(experts) = ExpertLayout::of(base.spec) {
        tensors = experts.written(tensors)?;
    }
    tensors.iter_mut().for_each(|(name, _)| *name = format!("{PREFIX}{}", base.outside(name)));
    let config = LoraConfig { modules_to_save: tables, ..listed.config };
    let mut json = config.to_peft(base.name, &listed.modules, &listed.parameters);
    if tied && tables.embed_tokens {
        json["ensure_weight_tying"] = true.into();
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut with_config = format.clone();
    with_config.insert(METADATA_KEY.into(), json.to_string());
    let text = serde_json::to_string_pretty(&json).map_err(|e| Error::broken(dir, e))?;
    let config_path = dir.join(CONFIG);
    fs::write(&config_path, text).map_err(pmetal_core::Error::io("write", &config_path))?;
    let permissions = fs::metadata(&config_path).map_err(pmetal_core::Error::io("read", &config_path))?.permissions();
    for (name, metadata) in [(WEIGHTS, format), (SINGLE_FILE, with_config)] {
        let path = dir.join(name);
        let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(|e| not_written(&path, e))?;
        // the crate goes by way of a temporary file, which nobody else may read
        fs::set_permissions(&path, permissions.clone()).map_err(pmetal_core::Error::io("write", &path))?;
    }
    Ok(())
}

/// What is saved of a parameter: f32 of an adapter, the dtype of the model of a table.
pub fn saved(param: &Param) -> &Tensor {
    if [EMBEDDING, HEAD].contains(&param.name()) { param.value() } else { param.master() }
}

fn not_written(path: &Path, error: safetensors::SafeTensorError) -> Error {
    match error {
        safetensors::SafeTensorError::IoError(source) => pmetal_core::Error::io("write", path)(source).into(),
        other => Error::broken(path, other),
    }
}
