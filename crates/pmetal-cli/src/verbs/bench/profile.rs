//! Where time goes, as a table and as JSON.

use std::io::{self, Write};

use candle_core::Device;
use pmetal::ops::{
    doctor::{self, Rates},
    profile::{Cost, Profile},
};
use serde_json::{Value, json};

use super::round;
use crate::{style::Style, verbs::Result};

/// What the device reaches at most, to hold the operations' rates against. None for a CPU, whose limits depend on which cache it is that
/// feeds them.
pub fn limits(device: &Device) -> Result<Option<Rates>> {
    Ok(if device.is_cpu() { None } else { Some(doctor::rates(device)?) })
}

/// What an operation took of each of `times` runs: calls, milliseconds, and rates where it has products or tells what it moves.
struct Figures {
    calls: f64,
    ms: f64,
    share: f64,
    gflop_s: Option<f64>,
    gb_s: Option<f64>,
    /// The least time that the device's limits allow, of the time it took.
    of_limit: Option<f64>,
}

impl Figures {
    fn new(cost: &Cost, profile: &Profile, times: usize, limits: Option<&Rates>) -> Self {
        let seconds = cost.time.as_secs_f64();
        let rate = |amount: f64| (amount > 0.0 && seconds > 0.0).then(|| amount / seconds / 1e9);
        let (gflop_s, gb_s) = (rate(cost.flops), rate(cost.bytes));
        let of_limit = limits.and_then(|limits| {
            let arithmetic = gflop_s.map(|rate| rate / limits.teraflops / 1e3);
            let fastest = limits.read_gigabytes_per_second.unwrap_or(0.0).max(limits.copy_gigabytes_per_second);
            let memory = gb_s.map(|rate| rate / fastest);
            arithmetic.into_iter().chain(memory).reduce(f64::max)
        });
        Self {
            calls: cost.calls as f64 / times as f64,
            ms: seconds * 1e3 / times as f64,
            share: seconds / profile.time.as_secs_f64(),
            gflop_s,
            gb_s,
            of_limit,
        }
    }
}

/// Time outside of every operation: on a GPU, also that between two of them in which it had nothing to do.
fn elsewhere(profile: &Profile) -> Cost {
    let inside = profile.ops.iter().map(|(_, _, cost)| cost.time).sum();
    Cost { time: profile.time.saturating_sub(inside), ..Cost::default() }
}

/// Writes the table of `times` runs of `what` to stderr.
pub fn print(what: &str, profile: &Profile, times: usize, limits: Option<&Rates>) -> Result<()> {
    let mut out = io::stderr();
    let title = format!("OPERATIONS OF {}", what.to_uppercase());
    let header = format!(
        "{title:<38} {:<9} {:>6} {:>10} {:>7} {:>8} {:>8} {:>8}",
        "", "CALLS", "MS", "SHARE", "FLOP/S", "BYTES/S", "OF LIMIT"
    );
    writeln!(out, "{}", Style::stderr().bold(&header))?;
    for (op, direction, cost) in &profile.ops {
        let Figures { calls, ms, share, gflop_s, gb_s, of_limit } = Figures::new(cost, profile, times, limits);
        let [flop_s, byte_s] = [gflop_s, gb_s].map(|rate| rate.map_or(String::new(), short));
        let of_limit = of_limit.map_or(String::new(), |part| format!("{:.0} %", part * 100.0));
        let line = format!(
            "{op:<38} {direction:<9} {calls:>6.0} {ms:>10.3} {:>5.1} % {flop_s:>8} {byte_s:>8} {of_limit:>8}",
            share * 100.0
        );
        writeln!(out, "{}", line.trim_end())?;
    }
    let Figures { ms, share, .. } = Figures::new(&elsewhere(profile), profile, times, None);
    writeln!(out, "{:<38} {:<9} {:>6} {ms:>10.3} {:>5.1} %", "elsewhere", "", "", share * 100.0)?;
    let all = profile.time.as_secs_f64() * 1e3 / times as f64;
    writeln!(out, "{:<38} {:<9} {:>6} {all:>10.3} {:>5.1} %", "all", "", "", 100.0)?;
    if let Some(limits) = limits {
        let (product, copy) = (short(limits.teraflops * 1e3), short(limits.copy_gigabytes_per_second));
        let read =
            limits.read_gigabytes_per_second.map_or(String::new(), |rate| format!(", reading {}B/s", short(rate)));
        writeln!(out, "limits measured: a product {product}FLOP/s, a copy {copy}B/s{read}")?;
    }
    Ok(writeln!(out)?)
}

/// A rate in thousands of millions a second, as `925 G` or `3.80 T`.
fn short(rate: f64) -> String {
    match rate {
        rate if rate < 999.5 => format!("{rate:.0} G"),
        rate if rate < 9_995.0 => format!("{:.2} T", rate / 1e3),
        rate => format!("{:.0} T", rate / 1e3),
    }
}

/// The same as a list of objects.
pub fn json(profile: &Profile, times: usize, limits: Option<&Rates>) -> Value {
    let object = |name: &str, direction: Option<String>, cost: &Cost| {
        let Figures { calls, ms, share, gflop_s, gb_s, of_limit } = Figures::new(cost, profile, times, limits);
        json!({
            "op": name,
            "direction": direction,
            "calls": round(calls, 2),
            "ms": round(ms, 4),
            "share": round(share, 4),
            "gflop_s": gflop_s.map(|rate| round(rate, 1)),
            "gb_s": gb_s.map(|rate| round(rate, 1)),
            "of_limit": of_limit.map(|part| round(part, 3)),
        })
    };
    let ops = profile.ops.iter();
    let rows = ops.map(|(op, direction, cost)| object(&op.to_string(), Some(direction.to_string()), cost));
    rows.chain([object("elsewhere", None, &elsewhere(profile))]).collect()
}
