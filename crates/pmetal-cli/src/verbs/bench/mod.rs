mod generate;
mod profile;
mod rows;
mod train;

use super::Result;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal bench train --model-config config.json --batch 2 --seq 512 --steps 5
  pmetal bench train --model-config config.json --profile
  pmetal bench train --model-config config.json --device cuda --batch 4 --seq 2048 --packed
  pmetal bench generate --model ./model --prompt-tokens 512 --tokens 128
  pmetal bench generate --model-config config.json --device cuda";

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

/// The middle one, or the mean of the two in the middle. There is at least one.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let (below, above) = ((figures.len() - 1) / 2, figures.len() / 2);
    (figures[below] + figures[above]) / 2.0
}

fn round(x: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (x * unit).round() / unit
}

#[cfg(test)]
mod tests {
    #[test]
    fn medians() {
        assert_eq!(super::median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(super::median(vec![4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(super::median(vec![7.0]), 7.0);
    }
}
