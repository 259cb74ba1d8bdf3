use std::{
    io::{self, Write},
    path::PathBuf,
};

use pmetal::{
    data::{Format, Template, Words, convert},
    trainer::DataOptions,
};

use super::{Failure, Result, tokenizer};
use crate::{reading::Reading, transfer_bars::TransferBars};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal data convert --dataset alpaca.json --to messages --output rows.jsonl
  pmetal data convert --dataset qa.csv --columns instruction=question,output=answer --to sharegpt --output rows.json
  pmetal data convert --dataset rows.jsonl --to tokens --model ./Qwen3-0.6B --output ids.jsonl.zst";

/// Flags of `pmetal data convert`.
#[derive(clap::Args)]
pub struct Args {
    /// Format to write: messages, sharegpt, alpaca, text, prompt-completion, preference, tokens
    #[arg(long, value_name = "FORMAT")]
    to: Format,
    /// File to write: .jsonl, .json, .csv or .tsv, also with .gz or .zst
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Model whose template makes text of conversations, and whose tokenizer makes tokens
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH", help_heading = "Input")]
    model: Option<PathBuf>,
    #[command(flatten)]
    data: DataOptions,
}

/// Writes the rows and says how many there were.
pub fn run(args: &Args) -> Result<()> {
    args.data.validate()?;
    if !args.data.dataset_weights.is_empty() {
        return Err(Failure::Usage("--dataset-weights: rows are written once; leave it out".into()));
    }
    let tokenizer = args.model.as_deref().map(tokenizer).transpose()?.flatten();
    let template = Template::choose(&args.data.chat_template, tokenizer.as_ref())?;
    let options = args.data.dataset_options(template, usize::MAX);
    let words = tokenizer.as_ref().map(|tokenizer| Words { tokenizer, options: &options });
    let mix = args.data.mix(0, &TransferBars::downloads())?;
    let most = args.data.max_samples;
    let rows = convert(&mix, &options.columns, most, args.to, words, &args.output, &mut Reading::new())?;
    Ok(writeln!(io::stdout(), "{}: {rows} rows", args.output.display())?)
}
