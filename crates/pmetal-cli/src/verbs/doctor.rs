use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use pmetal::{
    core::DeviceChoice,
    ops::doctor::{self, Check, Machine, Progress, Rates, Report},
};
use serde_json::Value;

use super::{Failure, Result};
use crate::{style::Style, tell::tell, version};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal doctor
  pmetal doctor --device cuda:1
  pmetal doctor --json > doctor.json

Every operation computes forward and backward on the device and, by its formula in
double precision, on the host. One that differs by more than rounding explains is
switched off on this machine from then on: it computes more slowly, by its formula.
It is switched on again by a run of the doctor that finds it right. A report of a
mistake is best made with what --json prints; there is nothing private in it.";

/// Flags of `pmetal doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// Device: auto, cpu, cuda, cuda:1 and so on, metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Columns of a line of the table, and of the lists of kernels below.
const WIDTH: usize = 99;

/// A compiler may have a lot to say.
const LONGEST_REASON: usize = 4 * WIDTH;

/// Examines the device, and fails where a kernel is wrong.
pub fn run(args: &Args) -> Result<()> {
    let report = if args.json { as_json(args.device)? } else { as_table(args.device)? };
    if let Some(reason) = &report.not_kept {
        tell(format_args!("warning: later runs will not know of this: {reason}"));
    }
    if report.switched_off.is_empty() {
        return Ok(());
    }
    let off: Vec<&str> = report.switched_off.iter().map(String::as_str).collect();
    Err(Failure::Kernels(format!(
        "kernels of {} are wrong on this machine and switched off: PMetal computes without them; please report what \
         `pmetal doctor --json` prints",
        off.join(", ")
    )))
}

fn as_json(device: DeviceChoice) -> Result<Report> {
    let report = doctor::run(device, |_| {})?;
    let mut json = serde_json::json!({
        "version": version::VERSION.as_str(),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
    });
    let found = serde_json::to_value(&report).map_err(io::Error::from)?;
    if let (Value::Object(json), Value::Object(found)) = (&mut json, found) {
        json.extend(found);
    }
    writeln!(io::stdout(), "{json:#}")?;
    Ok(report)
}

/// Prints the table row by row, as checks end.
fn as_table(device: DeviceChoice) -> Result<Report> {
    let (mut table, mut printed) = (Table { style: Style::stdout(), kernels: BTreeSet::new() }, Ok(()));
    let report = doctor::run(device, |progress| {
        if printed.is_ok() {
            printed = match progress {
                Progress::Opened(machine) => table.head(machine),
                Progress::Checked(check) => table.row(check),
            };
        }
    })?;
    printed?;
    table.end(&report)?;
    Ok(report)
}

struct Table {
    style: Style,
    /// Launched by the checks so far.
    kernels: BTreeSet<&'static str>,
}

impl Table {
    fn head(&mut self, machine: &Machine) -> io::Result<()> {
        let mut out = io::stdout();
        let Machine { device, name, driver, features, .. } = machine;
        writeln!(out, "{}", self.style.bold(&format!("pmetal {} on {device}", version::VERSION.as_str())))?;
        writeln!(out, "device    {name}\ndriver    {driver}")?;
        writeln!(out, "features  {}", wrapped(features.iter().map(String::as_str), ", ", "          "))?;
        let total = machine.memory_total.map_or("unknown".into(), gibibytes);
        writeln!(out, "memory    {total}, {} in use by PMetal\n", gibibytes(machine.memory_live))?;
        let header = cells("OPERATION", "DTYPE", ["ERROR", "BACKWARD", "ALLOWED", "TIME", "BOTH"]);
        writeln!(out, "{}", self.style.bold(&header))
    }

    fn row(&mut self, check: &Check) -> io::Result<()> {
        self.kernels.extend(&check.kernels);
        let error = |error: Option<f64>| error.map_or("-".into(), |error| format!("{error:.1e}"));
        let time = |us: Option<f64>| us.map_or("-".into(), microseconds);
        let numbers = [
            error(check.forward_error),
            error(check.backward_error),
            error(Some(check.tolerance)),
            time(check.forward_us),
            time(check.forward_backward_us),
        ];
        let line = cells(check.name, check.dtype, numbers.each_ref().map(String::as_str));
        let mut out = io::stdout();
        match &check.failure {
            None => writeln!(out, "{line}  ok"),
            Some(reason) => {
                writeln!(out, "{line}  {}", self.style.error("WRONG"))?;
                let shown = console::truncate_str(reason, LONGEST_REASON, " … (--json has all of it)");
                writeln!(out, "  {}", wrapped(shown.split_whitespace(), " ", "  "))
            }
        }
    }

    fn end(&self, report: &Report) -> io::Result<()> {
        let mut out = io::stdout();
        writeln!(out)?;
        if let Some(Rates {
            product_dtype,
            product_shape: [m, n, k],
            teraflops,
            copy_bytes,
            copy_gigabytes_per_second,
            read_gigabytes_per_second,
        }) = &report.rates
        {
            writeln!(out, "product   {teraflops:.2} TFLOP/s ({product_dtype}, {m} x {n} x {k})")?;
            writeln!(out, "copy      {copy_gigabytes_per_second:.0} GB/s ({} MiB read and written)", copy_bytes >> 20)?;
            if let Some(rate) = read_gigabytes_per_second {
                writeln!(out, "reading   {rate:.0} GB/s")?;
            }
        }
        if !self.kernels.is_empty() {
            writeln!(out, "kernels   {}", wrapped(self.kernels.iter().copied(), ", ", "          "))?;
        }
        if report.switched_off.is_empty() {
            writeln!(out, "\nevery operation agrees with its reference")?;
        }
        Ok(())
    }
}

fn cells(name: &str, dtype: &str, [error, backward, allowed, time, both]: [&str; 5]) -> String {
    format!("{name:<33} {dtype:<5} {error:>8} {backward:>8} {allowed:>8} {time:>9} {both:>9}")
}

/// Microseconds up to where milliseconds read better.
fn microseconds(us: f64) -> String {
    if us < 9_999.5 { format!("{us:.0} us") } else { format!("{:.0} ms", us / 1e3) }
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Words with `between` in between, in lines that begin with `margin`, but for the first.
fn wrapped<'a>(words: impl Iterator<Item = &'a str>, between: &str, margin: &str) -> String {
    let (mut text, mut columns) = (String::new(), margin.len());
    for word in words {
        if !text.is_empty() && columns + word.len() + 2 * between.len() > WIDTH {
            text.push_str(between.trim_end());
            text.push('\n');
            text.push_str(margin);
            columns = margin.len();
        } else if !text.is_empty() {
            text.push_str(between);
            columns += between.len();
        }
        text.push_str(word);
        columns += word.chars().count();
    }
    text
}
