use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::Tensor;
use pmetal::{
    core::{Error as FileError, StagedFile},
    lora::{Use, attach_file},
    models::Input,
    ops::no_grad,
};

use super::{Failure, ModelArgs, Result};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Example:
  echo '[[1, 2, 3], [4, 5]]' > ids.json
  pmetal logits --model ./model --ids ids.json --dtype f32 \\
      --output out.safetensors";

/// Flags of `pmetal logits`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON list of lists of token ids
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// Safetensors file for the tensors logits.0, logits.1, … (f32, [len, vocab])
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Writes the logits of every list of ids.
pub fn run(args: &Args) -> Result<()> {
    let text = fs::read(&args.ids).map_err(FileError::io("read", &args.ids))?;
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&text).map_err(|e| Failure::Content {
        path: args.ids.clone(),
        reason: format!("expected a list of lists of token ids: {e}"),
    })?;
    let refuse = |reason| Err(Failure::Content { path: args.ids.clone(), reason });
    if lists.is_empty() {
        return refuse("has no list of token ids".into());
    }
    if let Some(i) = lists.iter().position(Vec::is_empty) {
        return refuse(format!("list {i} (from 0) is empty"));
    }
    let adapter = match args.model.adapters() {
        [] => None,
        [path] => Some(args.model.adapter(path)?),
        _ => return Err(Failure::Usage("--lora: takes one adapter here; run the command once for each".into())),
    };
    let mut model = args.model.load(&args.model.checkpoint()?)?;
    if let Some(adapter) = adapter {
        attach_file(model.as_mut(), &adapter, Use::Inference)?;
    }
    let known = model.spec().vocab_size;
    for (i, ids) in lists.iter().enumerate() {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= known) {
            let last = known.saturating_sub(1);
            return refuse(format!("list {i} (from 0) has the id {id}, the model knows the ids 0 to {last}"));
        }
    }
    let staged = StagedFile::new(&args.output)?;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for (i, ids) in lists.iter().enumerate() {
        let hidden = no_grad(|| model.forward(&Input::rows(ids, &[ids.len()]), None))?;
        tensors.insert(format!("logits.{i}"), model.logits(hidden.tensor())?);
    }
    candle_core::safetensors::save(&tensors, staged.path())?;
    Ok(staged.commit()?)
}
