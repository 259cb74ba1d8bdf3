use std::{
    io::{self, Write},
    path::PathBuf,
};

use pmetal::hub::{Choice, Hub, Kind, RepoId, Wanted};

use super::{Failure, Result};
use crate::transfer_bars::TransferBars;

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal download Qwen/Qwen3-0.6B
  pmetal download bartowski/Qwen_Qwen3-0.6B-GGUF:Q4_K_M
  pmetal download tatsu-lab/alpaca --repo-type dataset
  pmetal download Qwen/Qwen3-0.6B --revision main --include '*.json' --local-dir ./qwen

The cache is the one of Python's huggingface_hub. HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are heeded.";

/// Flags of `pmetal download`.
#[derive(clap::Args)]
pub struct Args {
    /// What to download: org/name, org/name@REVISION, org/name:FILE.gguf
    #[arg(value_name = "ID")]
    id: String,
    /// What the repository holds
    #[arg(long, value_enum, default_value_t, value_name = "TYPE")]
    repo_type: RepoType,
    /// Branch, tag or commit
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Only files that match one of these patterns, instead of those a run needs; * matches slashes too
    #[arg(long, value_name = "GLOB")]
    include: Vec<String>,
    /// No files that match one of these patterns
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Put the files into this folder instead of the cache
    #[arg(long, value_name = "DIR")]
    local_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum RepoType {
    /// A model or an adapter
    #[default]
    Model,
    /// A dataset
    Dataset,
}

/// Downloads, and prints the folder (or the file) to stdout.
pub fn run(args: &Args) -> Result<()> {
    let repo = RepoId::with_revision(&args.id, args.revision.as_deref())?;
    let kind = match args.repo_type {
        RepoType::Model => Kind::Model,
        RepoType::Dataset => Kind::Dataset,
    };
    let mut wanted = Wanted { local_dir: args.local_dir.clone(), ..Wanted::new(kind, repo) };
    if !args.include.is_empty() || !args.exclude.is_empty() {
        if wanted.repo.file.is_some() {
            return Err(Failure::Usage(
                "--include and --exclude: the id names a file already, leave one of them out".into(),
            ));
        }
        wanted.choice = Choice::Matching { include: args.include.clone(), exclude: args.exclude.clone() };
    }
    let path = Hub::from_env()?.download(&wanted, &TransferBars::downloads())?;
    Ok(writeln!(io::stdout(), "{}", path.display())?)
}
