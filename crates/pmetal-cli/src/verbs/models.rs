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

/// Every family is one decoder with other numbers, so each can do all that the decoder can.
const ALL_CAN: [&str; 3] = ["inference", "lora", "full"];
/// Numbers of few bits that are read from safetensors files, whatever the family.
const QUANTIZED: [&str; 2] = ["fp8", "mxfp4"];

fn as_json() -> Value {
    let family = |family: &Family| {
        let architectures = gguf::architectures_of(family.model_type);
        let mut row = json!({
            "name": family.name,
            "sizes": family.sizes,
            "model_type": family.model_type,
            "text_part_of": family.holder.map(|holder| holder.model_type),
            "architecture": family.architecture,
            "experts": family.experts,
            "gguf": !architectures.is_empty(),
            "gguf_architectures": architectures,
        });
        ALL_CAN.iter().for_each(|can| row[can] = true.into());
        row
    };
    json!({
        "families": known_families().iter().map(family).collect::<Vec<_>>(),
        "rope_scaling": ROPE_SCALING_KINDS,
        "weights": ["safetensors", "gguf"],
        "quantized": QUANTIZED,
    })
}

fn as_table(style: Style) -> String {
    let rows = known_families().iter().map(|family| {
        let experts = if family.experts { "yes" } else { "no" };
        let gguf = gguf::architectures_of(family.model_type).join(", ");
        [family.name, family.sizes, family.model_type, experts].map(str::to_owned).into_iter().chain([gguf]).collect()
    });
    let header = ["FAMILY", "SIZES", "MODEL TYPE", "EXPERTS", "GGUF"].map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..5).map(width).collect();
    let mut text = String::new();
    for (place, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        let line = cells.join("  ");
        text += &if place == 0 { style.bold(line.trim_end()) } else { line.trim_end().to_owned() };
        text.push('\n');
    }
    text + &notes()
}

/// What holds for all of them.
fn notes() -> String {
    let wholes: Vec<&str> =
        known_families().iter().filter_map(|family| family.holder).map(|holder| holder.model_type).collect();
    format!(
        "
All of them: inference, LoRA adapters (of experts too), full fine-tuning.
Of models that see as well ({}), the text part.
Weights: safetensors (bf16, f16, f32; block-scaled fp8 and mxfp4 are read as
bf16) in a Hugging Face folder, or a GGUF file of the architecture named above.
Rope scaling: {}.
",
        wholes.join(", "),
        ROPE_SCALING_KINDS.join(", ")
    )
}
