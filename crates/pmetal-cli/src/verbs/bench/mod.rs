mod generate;
mod profile;
mod train;

use pmetal::ops::random;

use super::Result;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal bench train --model-config config.json --batch 2 --seq 512 --steps 5
  pmetal bench train --model-config config.json --profile
  pmetal bench generate --model ./model --prompt-tokens 512 --tokens 128";

/// Flags of `pmetal bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Time LoRA training steps on random weights of a given shape; prints one JSON object
    #[command(after_long_help = EXAMPLES)]
    Train(train::Args),
    /// Time reading a prompt and making tokens with a model; prints one JSON object
    #[command(after_long_help = EXAMPLES)]
    Generate(generate::Args),
}

/// Runs the benchmark that was asked for.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Train(args) => train::run(args),
        What::Generate(args) => generate::run(args),
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn random_ids(seed: u64, count: usize, vocab_size: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (random::uniform(seed, i) * vocab_size as f32) as u32).collect()
}

fn round(x: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (x * unit).round() / unit
}
