//! `pmetal`: fine-tune large language models on the machine in front of you.

mod interrupt;
mod layout;
mod progress;
mod reading;
mod stop;
mod style;
mod tell;
mod thinking;
mod transfer_bars;
mod usage;
mod verbs;
mod version;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use pmetal::memory::PoolAllocator;

/// Keeps large blocks between steps and counts what lives.
#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

/// Fine-tune large language models on the machine in front of you
#[derive(Parser)]
#[command(name = "pmetal", version = version::VERSION.as_str(), arg_required_else_help = true, max_term_width = 80)]
#[command(after_long_help = usage::TOUR)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    volume: tell::Volume,
}

#[derive(Subcommand)]
enum Verb {
    /// Fine-tune a model on rows of text: a LoRA adapter, or every weight
    #[command(after_long_help = verbs::train::EXAMPLES, mut_arg("dataset", verbs::train::unless_dry_run))]
    Train(Box<verbs::train::Args>),
    /// Chat with a model, answer or continue a prompt, or a file of them
    #[command(after_long_help = verbs::infer::EXAMPLES)]
    Infer(Box<verbs::infer::Args>),
    /// Look at a dataset: preview what is trained, count it, convert it
    #[command(after_long_help = verbs::data::EXAMPLES)]
    Data(verbs::data::Args),
    /// List the families of models, and what each supports
    #[command(after_long_help = verbs::models::EXAMPLES)]
    Models(verbs::models::Args),
    /// Write the logits of given token ids, to compare with another implementation
    #[command(after_long_help = verbs::logits::EXAMPLES)]
    Logits(verbs::logits::Args),
    /// Download a model, an adapter or a dataset of the hub into the cache, and print where it is
    #[command(after_long_help = verbs::download::EXAMPLES)]
    Download(verbs::download::Args),
    /// Upload the folder of an adapter or model to the hub, with a model card
    #[command(after_long_help = verbs::upload::EXAMPLES)]
    Upload(verbs::upload::Args),
    /// Measure this machine
    #[command(after_long_help = verbs::bench::EXAMPLES)]
    Bench(verbs::bench::Args),
    /// Check every kernel of this machine against its reference, and time it
    #[command(after_long_help = verbs::doctor::EXAMPLES)]
    Doctor(verbs::doctor::Args),
    /// Print a script that completes verbs, flags and paths in a shell
    #[command(after_long_help = verbs::completions::EXAMPLES)]
    Completions(verbs::completions::Args),
    /// Write the manual pages
    #[command(hide = true, after_long_help = verbs::man::EXAMPLES)]
    Man(verbs::man::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::explain(&error, &Cli::command()),
    };
    cli.volume.set();
    tracing::debug!(version = version::VERSION.as_str(), threads = rayon::current_num_threads(), "started");
    // on a thread of the pool, so that kernels need not wake it for each call
    let result = rayon::scope(|_| match &cli.verb {
        Verb::Train(args) => verbs::train::run(args),
        Verb::Infer(args) => verbs::infer::run(args),
        Verb::Data(args) => verbs::data::run(args),
        Verb::Models(args) => verbs::models::run(args),
        Verb::Logits(args) => verbs::logits::run(args),
        Verb::Download(args) => verbs::download::run(args),
        Verb::Upload(args) => verbs::upload::run(args),
        Verb::Bench(args) => verbs::bench::run(args),
        Verb::Doctor(args) => verbs::doctor::run(args),
        Verb::Completions(args) => verbs::completions::run(args, Cli::command()),
        Verb::Man(args) => verbs::man::run(args, Cli::command()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_closed_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            tell::tell_error(failure.told());
            ExitCode::from(failure.exit_code())
        }
    }
}
