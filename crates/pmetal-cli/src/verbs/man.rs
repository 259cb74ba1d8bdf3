use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Command;
use clap_mangen::{
    Man,
    roff::{Roff, roman},
};
use pmetal::core::Error as FileError;

use super::Result;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Example:
  pmetal man --output ~/.local/share/man/man1 && man pmetal-train";

/// Flags of `pmetal man`.
#[derive(clap::Args)]
pub struct Args {
    /// Folder for pmetal.1 and a page for each verb; made where it is missing
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Writes a page for the command and for each of its verbs.
pub fn run(args: &Args, command: Command) -> Result<()> {
    fs::create_dir_all(&args.output).map_err(FileError::io("create", &args.output))?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    write_pages(command, &args.output)
}

fn write_pages(command: Command, folder: &Path) -> Result<()> {
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        write_pages(verb.clone(), folder)?;
    }
    let examples = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string);
    // clap_mangen would run the lines of the examples together
    let man = Man::new(command.after_help(None::<&str>).after_long_help(None::<&str>));
    let mut page = Vec::new();
    man.render(&mut page)?;
    if let Some(examples) = examples {
        page.extend(examples_section(&examples).into_bytes());
    }
    let path = folder.join(man.get_filename());
    Ok(fs::write(&path, page).map_err(FileError::io("write", &path))?)
}

/// The lines as they stand, under a heading of the manual's.
fn examples_section(examples: &str) -> String {
    let mut roff = Roff::new();
    roff.control("SH", ["EXAMPLES"]).control("nf", []);
    for line in examples.lines().skip(1) {
        roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
    }
    roff.control("fi", []);
    roff.to_roff()
}
