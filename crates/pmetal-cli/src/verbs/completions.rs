use std::io::{self, Write};

use clap::Command;
use clap_complete::{Shell, generate};

use super::Result;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal completions bash > ~/.local/share/bash-completion/completions/pmetal
  pmetal completions zsh > \"${fpath[1]}/_pmetal\"
  pmetal completions fish > ~/.config/fish/completions/pmetal.fish";

/// Flags of `pmetal completions`.
#[derive(clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Prints the script for whatever verbs and flags `command` has.
pub fn run(args: &Args, mut command: Command) -> Result<()> {
    let mut script = Vec::new();
    generate(args.shell, &mut command, "pmetal", &mut script);
    Ok(io::stdout().write_all(&script)?)
}
