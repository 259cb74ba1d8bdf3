//! Where time goes, as a table and as JSON.

use std::io::{self, Write};

use candle_core::Device;
use pmetal::ops::profile::{Cost, Profile};
use serde_json::{Value, json};

use super::round;
use crate::{
    style::Style,
    verbs::{Failure, Result},
};

/// Refuses to time operations where they return before they are done.
pub fn check(wanted: bool, device: &Device) -> Result<()> {
    if wanted && !device.is_cpu() {
        return Err(Failure::Usage(
            "--profile times operations on the CPU: a GPU's have only been asked for when they return (give --device cpu)".into(),
        ));
    }
    Ok(())
}

/// What an operation took of each of `times` runs: calls, milliseconds, and GFLOP/s where it has products.
struct Figures {
    calls: f64,
    ms: f64,
    share: f64,
    gflop_s: Option<f64>,
}

impl Figures {
    fn new(cost: &Cost, profile: &Profile, times: usize) -> Self {
        let seconds = cost.time.as_secs_f64();
        Self {
            calls: cost.calls as f64 / times as f64,
            ms: seconds * 1e3 / times as f64,
            share: seconds / profile.time.as_secs_f64(),
            gflop_s: (cost.flops > 0.0).then(|| cost.flops / seconds / 1e9),
        }
    }
}

/// Time outside of every operation.
fn elsewhere(profile: &Profile) -> Cost {
    let inside = profile.ops.iter().map(|(_, _, cost)| cost.time).sum();
    Cost { time: profile.time.saturating_sub(inside), ..Cost::default() }
}

/// Writes the table of `times` runs of `what` to stderr.
pub fn print(what: &str, profile: &Profile, times: usize) -> Result<()> {
    let mut out = io::stderr();
    let header = format!(
        "{:<38} {:<9} {:>6} {:>10} {:>7} {:>8}",
        format!("OPERATIONS OF {}", what.to_uppercase()),
        "",
        "CALLS",
        "MS",
        "SHARE",
        "GFLOP/S"
    );
    writeln!(out, "{}", Style::stderr().bold(&header))?;
    for (op, direction, cost) in &profile.ops {
        let Figures { calls, ms, share, gflop_s } = Figures::new(cost, profile, times);
        let gflop_s = gflop_s.map_or(String::new(), |rate| format!("{rate:.0}"));
        writeln!(out, "{op:<38} {direction:<9} {calls:>6.0} {ms:>10.3} {:>5.1} % {gflop_s:>8}", share * 100.0)?;
    }
    let Figures { ms, share, .. } = Figures::new(&elsewhere(profile), profile, times);
    writeln!(out, "{:<38} {:<9} {:>6} {ms:>10.3} {:>5.1} %", "elsewhere", "", "", share * 100.0)?;
    let all = profile.time.as_secs_f64() * 1e3 / times as f64;
    Ok(writeln!(out, "{:<38} {:<9} {:>6} {all:>10.3} {:>5.1} %\n", "all", "", "", 100.0)?)
}

/// The same as a list of objects.
pub fn json(profile: &Profile, times: usize) -> Value {
    let object = |name: &str, direction: Option<String>, cost: &Cost| {
        let Figures { calls, ms, share, gflop_s } = Figures::new(cost, profile, times);
        json!({
            "op": name,
            "direction": direction,
            "calls": round(calls, 2),
            "ms": round(ms, 4),
            "share": round(share, 4),
            "gflop_s": gflop_s.map(|rate| round(rate, 1)),
        })
    };
    let ops = profile.ops.iter();
    let rows = ops.map(|(op, direction, cost)| object(&op.to_string(), Some(direction.to_string()), cost));
    rows.chain([object("elsewhere", None, &elsewhere(profile))]).collect()
}
