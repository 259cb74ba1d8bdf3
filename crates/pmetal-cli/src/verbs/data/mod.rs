//! Looking at datasets: what is trained of each row, what they are like as a whole, and the same rows in another format.

mod convert;
mod preview;
mod stats;

use std::path::{Path, PathBuf};

use pmetal::{
    data::{DatasetOptions, Template, Tokenizer},
    hub::{Kind, locate},
    trainer::DataOptions,
};

use super::{Failure, Result};
use crate::transfer_bars::TransferBars;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal data preview --model ./Qwen3-0.6B --dataset rows.jsonl
  pmetal data stats --model ./Qwen3-0.6B --dataset rows.parquet
  pmetal data convert --dataset alpaca.json --to messages --output rows.jsonl";

/// Flags of `pmetal data`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Show rows token by token: what is trained, what is not, and whether the end of the turn is
    #[command(after_long_help = preview::EXAMPLES)]
    Preview(preview::Args),
    /// Show lengths, what a cut would lose, the share that is trained, duplicates and how well rows pack
    #[command(after_long_help = stats::EXAMPLES)]
    Stats(stats::Args),
    /// Write rows in another format
    #[command(after_long_help = convert::EXAMPLES)]
    Convert(convert::Args),
}

/// Runs what was asked for.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Preview(args) => preview::run(args),
        What::Stats(args) => stats::run(args),
        What::Convert(args) => convert::run(args),
    }
}

/// A dataset and the model whose tokenizer reads it.
#[derive(clap::Args)]
struct Input {
    /// Model whose tokenizer and chat template are used; its weights are not read
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH|ID", help_heading = "Input")]
    model: PathBuf,
    #[command(flatten)]
    data: DataOptions,
}

impl Input {
    /// The tokenizer, and how rows become tokens.
    fn open(&self) -> Result<(Option<Tokenizer>, DatasetOptions)> {
        self.data.validate()?;
        let tokenizer = tokenizer(&self.model)?;
        // ids are looked at, not trained on: any will do
        let template = Template::choose(&self.data.chat_template, tokenizer.as_ref())?;
        let options = self.data.dataset_options(template, usize::MAX);
        Ok((tokenizer, options))
    }
}

fn tokenizer(model: &Path) -> Result<Option<Tokenizer>> {
    Ok(Tokenizer::find(locate(Kind::Model, model, None, &TransferBars::downloads())?)?)
}
