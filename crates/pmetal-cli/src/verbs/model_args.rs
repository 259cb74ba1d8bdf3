use std::path::PathBuf;

use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    hub::{Kind, locate},
    lora::{AdapterFile, Use, attach_file},
    models::{CausalLMModel, Checkpoint, load},
};

use super::Result;
use crate::transfer_bars::TransferBars;

/// Which model to run, and how.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Model: a Hugging Face folder, a GGUF file, or an id of the hub (org/name, org/name:FILE.gguf)
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH|ID")]
    model: PathBuf,
    /// Branch, tag or commit of --model on the hub
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Adapter to use with it: a path, or an id of the hub
    #[arg(long, visible_alias = "adapter", value_name = "PATH|ID")]
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
        let bars = TransferBars::downloads();
        let path = locate(Kind::Model, &self.model, self.revision.as_deref(), &bars)?;
        let lora = self.lora.as_ref().map(|lora| locate(Kind::Model, lora, None, &bars)).transpose()?;
        let checkpoint = Checkpoint::open(&path)?;
        let dtype = self.dtype.resolve(checkpoint.stored_dtype());
        let mut model = load(&checkpoint, dtype, &self.device.resolve(), None)?;
        if let Some(lora) = &lora {
            attach_file(model.as_mut(), &AdapterFile::open(lora)?, Use::Inference)?;
        }
        Ok((checkpoint, model))
    }
}
