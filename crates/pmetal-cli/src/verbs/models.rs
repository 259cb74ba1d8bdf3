use std::io::{self, Write};

use pmetal::{
    gguf,
    models::{Family, ROPE_SCALING_KINDS, known_families},
};
use serde_json::{Value, json};

use super::Result;
use crate::style::Style;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal models
  pmetal models --json | jq -r '.families[].model_type'

A model belongs to a family by the model_type of its config.json, a GGUF file by
its key general.architecture.";

/// Flags of `pmetal models`.
#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints the families, from the registry that models are loaded by.
pub fn run(args: &Args) -> Result<()> {
    let text = if args.json { format!("{:#}\n", as_json()) } else { as_table(Style::stdout()) };
    Ok(io::stdout().write_all(text.as_bytes())?)
}

fn reads_gguf(family: &Family) -> bool {
    gguf::reads(family.model_type)
}

fn as_json() -> Value {
    let family = |family: &Family| {
        json!({
            "name": family.name,
            "sizes": family.sizes,
            "model_type": family.model_type,
            "architecture": family.architecture,
            "lora": true,
            "full": true,
            "inference": true,
            "gguf": reads_gguf(family),
        })
    };
    json!({
        "families": known_families().iter().map(family).collect::<Vec<_>>(),
        "rope_scaling": ROPE_SCALING_KINDS,
        "weights": ["safetensors", "gguf"],
    })
}

/// Every family is one decoder with other numbers, so each can do all that the decoder can.
fn as_table(style: Style) -> String {
    let rows = known_families().iter().map(|family| {
        let gguf = if reads_gguf(family) { "yes" } else { "no" };
        [family.name, family.sizes, family.model_type, family.architecture, "yes", "yes", "yes", gguf]
    });
    let header = ["FAMILY", "SIZES", "MODEL TYPE", "CLASS", "INFER", "LORA", "FULL", "GGUF"];
    let rows: Vec<[&str; 8]> = [header].into_iter().chain(rows).collect();
    let widths: [usize; 8] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default());
    let mut text = String::new();
    for (place, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let line = cells.join("  ");
        text += &if place == 0 { style.bold(line.trim_end()) } else { line.trim_end().to_owned() };
        text.push('\n');
    }
    text + &format!(
        "\nWeights: safetensors (bf16, f16, f32) in a Hugging Face folder, or a GGUF file.\nRope scaling: {}.\n",
        ROPE_SCALING_KINDS.join(", ")
    )
}
