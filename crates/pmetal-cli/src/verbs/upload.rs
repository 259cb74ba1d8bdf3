use std::{
    io::{self, Write},
    path::PathBuf,
};

use pmetal::hub::{Hub, RepoId, Upload};

use super::{Failure, Result};
use crate::transfer_bars::TransferBars;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal upload ./output me/my-adapter --private
  pmetal upload ./model me/my-model --revision v2 --message \"Trained on more rows\"
  pmetal upload ./output someone/their-adapter --create-pr

HF_TOKEN needs write access. Hidden files and checkpoint folders stay here. Without a README.md, in the folder and on the hub, a model card is
written from the adapter's settings and metrics.jsonl.";

/// Flags of `pmetal upload`.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of an adapter or model
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Repository, made where there is none: org/name
    #[arg(value_name = "ID")]
    id: String,
    /// Make the repository a private one
    #[arg(long)]
    private: bool,
    /// Branch, made where there is none [default: main]
    #[arg(long, value_name = "BRANCH")]
    revision: Option<String>,
    /// Title of the commit
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// Open a pull request instead of committing to the branch
    #[arg(long)]
    create_pr: bool,
}

/// Uploads, and prints the page of the commit (or of the pull request) to stdout.
pub fn run(args: &Args) -> Result<()> {
    let repo = RepoId::with_revision(&args.id, args.revision.as_deref())?;
    if repo.file.is_some() {
        return Err(Failure::Usage(format!("{}: a folder is uploaded to a repository, expected org/name", args.id)));
    }
    let upload = Upload {
        folder: &args.path,
        repo,
        private: args.private,
        message: args.message.as_deref(),
        create_pr: args.create_pr,
    };
    let done = Hub::from_env()?.upload(&upload, &TransferBars::uploads())?;
    Ok(writeln!(io::stdout(), "{}", done.pull_request_url.unwrap_or(done.commit_url))?)
}
