use std::{
    io::{self, Write},
    ops::ControlFlow,
};

use pmetal::data::{RowView, preview};
use serde_json::json;

use super::{Failure, Input, Result};
use crate::{layout::Layout, tell::tell, transfer_bars::TransferBars};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal data preview --model ./Qwen3-0.6B --dataset rows.jsonl
  pmetal data preview --model ./model --dataset chat.parquet --row 17 --train-on last
  pmetal data preview --model ./model --dataset rows.csv --columns instruction=question,output=answer --json";

/// Flags of `pmetal data preview`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    input: Input,
    /// How many rows to show
    #[arg(long, default_value_t = 3, value_name = "ROWS")]
    rows: usize,
    /// The first row to show, from 0
    #[arg(long, default_value_t = 0, value_name = "N")]
    row: usize,
    /// Print a JSON object for each row: its place, its tokens' ids, texts, and which are trained
    #[arg(long)]
    json: bool,
}

/// Prints rows as the model will see them.
pub fn run(args: &Args) -> Result<()> {
    let (tokenizer, options) = args.input.open()?;
    let mix = args.input.data.mix(0, &TransferBars::downloads())?;
    let mut out = io::stdout().lock();
    let layout = Layout::for_stdout();
    let (mut seen, mut shown, mut endings) = (0, 0, Endings::default());
    preview(&mix, tokenizer.as_ref(), &options, |row| {
        seen += 1;
        if seen <= args.row {
            return Ok::<_, Failure>(ControlFlow::Continue(()));
        }
        shown += 1;
        endings.count(&row, options.max_seq_len);
        if args.json {
            writeln!(out, "{}", object(&row))?;
        } else {
            layout.row(&mut out, &row, seen - 1, options.max_seq_len)?;
        }
        Ok(if shown == args.rows { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    if shown == 0 {
        return Err(Failure::Usage(format!("--row {}: the dataset has {seen} rows, counted from 0", args.row)));
    }
    if !args.json {
        layout.legend(&mut out)?;
    }
    endings.tell(shown);
    Ok(())
}

fn object(row: &RowView) -> serde_json::Value {
    let token = |t: &pmetal::data::TokenView| json!({"id": t.id, "text": t.text, "trained": t.trained, "special": t.special, "ends_turn": t.ends_turn});
    json!({
        "file": row.file, "place": row.place.to_string(),
        "tokens": row.tokens.iter().map(token).collect::<Vec<_>>(),
    })
}

/// How many rows teach the model to stop.
#[derive(Default)]
struct Endings {
    trained: usize,
    untrained_rows: usize,
}

impl Endings {
    fn count(&mut self, row: &RowView, max_seq_len: usize) {
        let kept = if max_seq_len == 0 { row.tokens.len() } else { max_seq_len };
        let kept = row.tokens.iter().take(kept);
        self.trained += usize::from(kept.clone().any(|t| t.ends_turn && t.trained));
        self.untrained_rows += usize::from(!kept.skip(1).any(|t| t.trained));
    }

    fn tell(&self, shown: usize) {
        if self.untrained_rows > 0 {
            tell(format_args!(
                "warning: {} of {shown} rows have no trained token and would be left out",
                self.untrained_rows
            ));
        }
        let silent = shown - self.trained - self.untrained_rows.min(shown - self.trained);
        if silent > 0 {
            tell(format_args!(
                "warning: in {silent} of {shown} rows no end of a turn is trained: the model would not learn to stop"
            ));
        }
    }
}
