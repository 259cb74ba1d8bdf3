use std::path::{Path, PathBuf};

use candle_core::DType;
use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    data::Tokenizer,
    hub::{Kind, locate},
    lora::AdapterFile,
    models::{CausalLMModel, Checkpoint, dtype_of, load, override_rope_scaling, random, read_config},
    ops::device,
};

use super::Result;
use crate::transfer_bars::TransferBars;

/// Which model to run, and how.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Model: a Hugging Face folder, a GGUF file, or an id of the hub (org/name, org/name:FILE.gguf)
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH|ID", required = true)]
    model: Option<PathBuf>,
    /// Branch, tag or commit of --model on the hub
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Adapter to use with it: a path, or an id of the hub; several, each with its own --lora, take turns
    #[arg(long, visible_alias = "adapter", value_name = "PATH|ID")]
    lora: Vec<PathBuf>,
    /// Scaling of rope in place of the model's own: yarn:4, linear:2, dynamic:2, none, or a JSON object
    #[arg(long, value_name = "KIND:FACTOR")]
    rope_scaling: Option<String>,
    /// Dtype of activations: auto (the checkpoint's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE")]
    dtype: DTypeChoice,
    /// Device: auto, cpu, cuda, cuda:1 and so on, metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
}

impl ModelArgs {
    /// The model's files, checked; no weight is read.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let path = locate(Kind::Model, self.name(), self.revision.as_deref(), &TransferBars::downloads())?;
        let mut checkpoint = Checkpoint::open(&path)?;
        if let Some(scaling) = &self.rope_scaling {
            checkpoint.override_rope_scaling(scaling)?;
        }
        Ok(checkpoint)
    }

    /// The tokenizer beside an adapter where there is one, else the checkpoint's.
    pub fn tokenizer(&self, checkpoint: &Checkpoint, adapter: Option<&Path>) -> Result<Tokenizer> {
        match Tokenizer::find_with_adapter(checkpoint.path(), adapter)? {
            Some(tokenizer) => Ok(tokenizer),
            // the error that says what is missing
            None => Ok(Tokenizer::from_model_path(checkpoint.path())?),
        }
    }

    /// The adapters, in the order they were named.
    pub fn adapters(&self) -> &[PathBuf] {
        &self.lora
    }

    /// Where an adapter is, by the name the user gave it.
    pub fn adapter_path(&self, named: &Path) -> Result<PathBuf> {
        Ok(locate(Kind::Model, named, None, &TransferBars::downloads())?)
    }

    /// An adapter, by the name the user gave it.
    pub fn adapter(&self, named: &Path) -> Result<AdapterFile> {
        Ok(AdapterFile::open(&self.adapter_path(named)?)?)
    }

    /// The model as the user named it.
    pub fn name(&self) -> &Path {
        self.model.as_deref().unwrap_or(Path::new(""))
    }

    /// The model without an adapter, ready to run.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<Box<dyn CausalLMModel>> {
        let dtype = self.dtype.resolve(checkpoint.stored_dtype());
        Ok(load(checkpoint, dtype, &device::open(self.device)?, None)?)
    }

    /// A model of random weights in the shape of a `config.json`, ready to run.
    pub fn random(&self, config: &Path) -> Result<Box<dyn CausalLMModel>> {
        let mut config = read_config(config)?;
        if let Some(scaling) = &self.rope_scaling {
            override_rope_scaling(&mut config, scaling)?;
        }
        let dtype = self.dtype.resolve(dtype_of(&config).unwrap_or(DType::BF16));
        Ok(random(&config, dtype, &device::open(self.device)?, 0, None)?)
    }
}
