use std::path::PathBuf;

use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    data::Tokenizer,
    lora::{AdapterFile, Use, attach_file},
    models::{CausalLMModel, Checkpoint, load},
};

use super::Result;

/// Which model to run, and how.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Model: a Hugging Face folder or a GGUF file
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH")]
    model: PathBuf,
    /// Adapter to use with it
    #[arg(long, visible_alias = "adapter", value_name = "PATH")]
    lora: Option<PathBuf>,
    /// Dtype of activations: auto (the checkpoint's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE")]
    dtype: DTypeChoice,
    /// Device: auto, cpu
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
}

impl ModelArgs {
    /// The model with its adapter, ready to run.
    pub fn open(&self) -> Result<(Checkpoint, Box<dyn CausalLMModel>)> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let dtype = self.dtype.resolve(checkpoint.stored_dtype());
        let mut model = load(&checkpoint, dtype, &self.device.resolve(), None)?;
        if let Some(lora) = &self.lora {
            attach_file(model.as_mut(), &AdapterFile::open(lora)?, Use::Inference)?;
        }
        Ok((checkpoint, model))
    }

    /// The adapter's tokenizer where it has one beside it, else the model's.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match Tokenizer::find_with_adapter(&self.model, self.lora.as_deref())? {
            Some(tokenizer) => Ok(tokenizer),
            // the error that says what is missing
            None => Ok(Tokenizer::from_model_path(&self.model)?),
        }
    }
}
