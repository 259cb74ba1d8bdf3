use std::{
    io::{self, Write},
    time::Instant,
};

use pmetal::data::{Dataset, Report, Stats};

use super::{Input, Result};
use crate::{reading::Reading, transfer_bars::TransferBars};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal data stats --model ./Qwen3-0.6B --dataset rows.jsonl
  pmetal data stats --model ./model --dataset rows.parquet --max-seq-len 3000 --json";

/// Columns of the longest bar.
const BAR: usize = 40;

/// Flags of `pmetal data stats`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    input: Input,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints figures of a dataset.
pub fn run(args: &Args) -> Result<()> {
    let (tokenizer, mut options) = args.input.open()?;
    // whole rows are counted: what a cut would do is one of the figures
    let cut = std::mem::take(&mut options.max_seq_len);
    let mix = args.input.data.mix(0, &TransferBars::downloads())?;
    let started = Instant::now();
    let dataset = Dataset::load(&mix, tokenizer.as_ref(), &options, &mut Reading::new())?;
    let stats = Stats::of(&dataset.examples, cut)?;
    crate::tell::tell(format_args!("read in {:.1} s", started.elapsed().as_secs_f64()));
    let mut out = io::stdout().lock();
    if args.json {
        let mut report = serde_json::to_value(&stats).map_err(io::Error::other)?;
        report["rows_read"] = dataset.report.rows.into();
        report["rows_left_out"] = dataset.report.dropped.into();
        return Ok(writeln!(out, "{report}")?);
    }
    write(&mut out, &stats, &dataset.report)?;
    Ok(())
}

fn write(out: &mut impl Write, stats: &Stats, report: &Report) -> io::Result<()> {
    let share = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
    let line = |out: &mut dyn Write, name: &str, value: String| writeln!(out, "{name:<18}{value}");
    line(out, "rows", grouped(stats.rows as u64))?;
    if report.dropped > 0 {
        line(out, "left out", grouped(report.dropped as u64))?;
        for row in &report.named {
            writeln!(out, "{:<18}  {}: {}", "", row.place, row.reason)?;
        }
    }
    let trained = share(stats.supervised_tokens as f64, stats.tokens as f64);
    line(out, "tokens", grouped(stats.tokens))?;
    line(out, "trained", format!("{} ({trained:.1} %)", grouped(stats.supervised_tokens)))?;
    let twice = share(stats.duplicates as f64, stats.rows as f64);
    line(out, "duplicates", format!("{} ({twice:.1} %)", grouped(stats.duplicates as u64)))?;
    let l = &stats.lengths;
    let spread =
        format!("{} min, {} median, {:.1} mean, {} p95, {} p99, {} max", l.min, l.median, l.mean, l.p95, l.p99, l.max);
    line(out, "tokens of a row", spread)?;

    writeln!(out, "\n{:>15}  {:>11}", "tokens", "rows")?;
    let most = stats.histogram.iter().map(|bin| bin.rows).max().unwrap_or(0).max(1);
    for bin in &stats.histogram {
        let bar = "█".repeat((bin.rows * BAR).div_ceil(most));
        writeln!(out, "{:>6} – {:>6}  {:>11}  {bar}", bin.from, bin.to - 1, grouped(bin.rows as u64))?;
    }

    writeln!(
        out,
        "\n{:>15}  {:>11}  {:>14}  {:>11}  {:>11}",
        "--max-seq-len", "rows cut", "tokens lost", "packs", "packs full"
    )?;
    for cut in &stats.cuts {
        writeln!(
            out,
            "{:>15}  {:>11}  {:>14}  {:>11}  {:>9.1} %",
            cut.max_seq_len,
            grouped(cut.truncated as u64),
            grouped(cut.lost_tokens),
            grouped(cut.packs as u64),
            cut.packing_efficiency * 100.0
        )?;
    }
    Ok(())
}

/// A number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let first = digits.len() % 3;
    let mut out = digits.get(..first).unwrap_or_default().to_string();
    for group in digits.as_bytes().get(first..).unwrap_or_default().chunks(3) {
        if !out.is_empty() {
            out.push(',');
        }
        out.extend(group.iter().map(|&digit| char::from(digit)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn digits_in_groups() {
        let numbers = [0, 7, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(numbers, ["0", "7", "999", "1,000", "1,234,567"]);
    }
}
