use std::path::{Path, PathBuf};

use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    data::Tokenizer,
    lora::AdapterFile,
    models::{CausalLMModel, Checkpoint, load},
};

use super::Result;

/// Which model to run, and how.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Model: a Hugging Face folder or a GGUF file
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH")]
    model: PathBuf,
    /// Adapter to use with it; several, each with its own --lora, take turns
    #[arg(long, visible_alias = "adapter", value_name = "PATH")]
    lora: Vec<PathBuf>,
    /// Dtype of activations: auto (the checkpoint's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE")]
    dtype: DTypeChoice,
    /// Device: auto, cpu
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
}

impl ModelArgs {
    /// The model's files, checked; no weight is read.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(&self.model)?)
    }

    /// The first adapter's tokenizer where it has one beside it, else the checkpoint's.
    pub fn tokenizer(&self, checkpoint: &Checkpoint) -> Result<Tokenizer> {
        match Tokenizer::find_with_adapter(checkpoint.path(), self.lora.first().map(PathBuf::as_path))? {
            Some(tokenizer) => Ok(tokenizer),
            // the error that says what is missing
            None => Ok(Tokenizer::from_model_path(checkpoint.path())?),
        }
    }

    /// The adapters, in the order they were named.
    pub fn adapters(&self) -> &[PathBuf] {
        &self.lora
    }

    /// An adapter, by the name the user gave it.
    pub fn adapter(&self, named: &Path) -> Result<AdapterFile> {
        Ok(AdapterFile::open(named)?)
    }

    /// The model as the user named it.
    pub fn name(&self) -> &Path {
        &self.model
    }

    /// The model without an adapter, ready to run.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<Box<dyn CausalLMModel>> {
        let dtype = self.dtype.resolve(checkpoint.stored_dtype());
        Ok(load(checkpoint, dtype, &self.device.resolve(), None)?)
    }
}
