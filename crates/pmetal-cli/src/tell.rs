//! What goes to stderr, and how much of it.

use std::{
    fmt::Display,
    io::{self, IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};

use tracing_subscriber::fmt::time::uptime;

use crate::style::Style;

/// An error is a line or two: what a file says goes into it, and files say things of any length.
const LONGEST_ERROR: usize = 600;

static QUIET: AtomicBool = AtomicBool::new(false);
static VERBOSE: AtomicBool = AtomicBool::new(false);

/// How much is said on stderr.
#[derive(clap::Args)]
pub struct Volume {
    /// Say more on stderr: files opened, sizes, times
    #[arg(short, long, global = true, conflicts_with = "quiet", help_heading = "Terminal")]
    verbose: bool,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true, help_heading = "Terminal")]
    quiet: bool,
}

impl Volume {
    /// Makes it so, for the whole program.
    pub fn set(&self) {
        QUIET.store(self.quiet, Ordering::Relaxed);
        VERBOSE.store(self.verbose, Ordering::Relaxed);
        if self.verbose {
            tracing_subscriber::fmt()
                .with_max_level(tracing::Level::DEBUG)
                .with_timer(uptime())
                .with_target(false)
                .with_ansi(false)
                .with_writer(io::stderr)
                .init();
        } else if !self.quiet {
            // what a user should know without asking
            tracing_subscriber::fmt()
                .with_max_level(tracing::Level::WARN)
                .without_time()
                .with_target(false)
                .with_ansi(false)
                .with_writer(io::stderr)
                .init();
        }
    }
}

/// Prints a line to stderr, unless `--quiet` asks for silence. Where nobody reads it any more (a closed pipe), the work goes on:
/// `eprintln!` would panic and lose it.
pub fn tell(line: impl Display) {
    if !QUIET.load(Ordering::Relaxed) {
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Whether stderr is the terminal of a person who wants to see bars move: lines of `--verbose` would tear them.
pub fn shows_bars() -> bool {
    let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    let plain = QUIET.load(Ordering::Relaxed) || VERBOSE.load(Ordering::Relaxed) || dumb;
    !plain && io::stderr().is_terminal()
}

/// Prints why the command stopped, whatever `--quiet` says: one line, readable whatever the files at fault hold.
pub fn tell_error(error: impl Display) {
    let _ = writeln!(io::stderr(), "{} {}", Style::stderr().error("error:"), one_line(&error.to_string()));
}

/// What templates and libraries say may have several lines, control characters out of a file, or a whole file quoted.
fn one_line(message: &str) -> String {
    let lines: Vec<&str> = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut shown = String::new();
    for character in lines.join(" ").chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    let length = shown.chars().count();
    if length <= LONGEST_ERROR {
        return shown;
    }
    // the file is named at the beginning, what to do at the end
    let half = LONGEST_ERROR / 2;
    let beginning: String = shown.chars().take(half).collect();
    let end: String = shown.chars().skip(length - half).collect();
    format!("{beginning} … {end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_readable_line() {
        assert_eq!(one_line("two\n  lines\r\n\n"), "two lines");
        assert_eq!(one_line("a\u{1b}[31mb\u{7}\tc"), "a\\u{1b}[31mb\\u{7}\\tc");
        let long = one_line(&format!("model.json: {} try again", "x".repeat(1 << 20)));
        assert!(long.starts_with("model.json: x") && long.ends_with("x try again") && long.len() < 700, "{long}");
    }
}
