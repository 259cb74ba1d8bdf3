//! The tour of the top-level help, and flags that are not understood, said in a line.

use std::process::ExitCode;

use clap::{Command, Error, error::ErrorKind};

use crate::tell::tell_error;

/// A first look around, shown under `pmetal --help`.
pub const TOUR: &str = "\
A short tour:
  pmetal models                        # which models can be trained
  pmetal data preview --dataset rows.jsonl --model ./Qwen3-0.6B
  pmetal train --model ./Qwen3-0.6B --dataset rows.jsonl --output ./adapter
  pmetal infer --model ./Qwen3-0.6B --lora ./adapter --chat --prompt \"Hi!\"

A model is a Hugging Face folder, a GGUF file or an id of the hub. Rows are JSON
lines, CSV, Parquet or text. `pmetal VERB --help` has examples and every flag.
Results go to stdout, everything else to stderr.";

/// Prints help and version as they are, and an error as one line with where to read on. The exit code is clap's.
pub fn explain(error: &Error, command: &Command) -> ExitCode {
    let code = ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // whoever closed the pipe has read enough
        let _ = error.print();
        return code;
    }
    let message = one_line(&error.render().to_string());
    let verb = std::env::args().nth(1).filter(|verb| command.find_subcommand(verb).is_some());
    let help = verb.map_or_else(|| "pmetal --help".to_owned(), |verb| format!("pmetal {verb} --help"));
    tell_error(format_args!("{message}; see `{help}`"));
    code
}

/// clap's message without its heading, the usage and the closing words.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim);
    let said = lines.filter(|line| {
        !line.is_empty() && !line.starts_with("Usage: ") && !line.starts_with("For more information, try")
    });
    let mut text = String::new();
    for line in said {
        let line = line.strip_prefix("error: ").unwrap_or(line);
        let between = if line.starts_with("tip: ") { "; " } else { " " };
        text += if text.is_empty() { "" } else { between };
        text += line;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clap_says_in_paragraphs_is_one_line() {
        let said = "error: unexpected argument '--modle' found\n\n  tip: a similar argument exists: '--model'\n\n\
                    Usage: pmetal train --model <PATH>\n\nFor more information, try '--help'.\n";
        assert_eq!(one_line(said), "unexpected argument '--modle' found; tip: a similar argument exists: '--model'");
        let missing =
            "error: the following required arguments were not provided:\n  --model <PATH>\n  --dataset <FILE>\n";
        assert_eq!(
            one_line(missing),
            "the following required arguments were not provided: --model <PATH> --dataset <FILE>"
        );
    }
}
