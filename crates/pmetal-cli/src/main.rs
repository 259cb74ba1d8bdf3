//! `pmetal`: fine-tune large language models on the machine in front of you.

mod interrupt;
mod layout;
mod progress;
mod reading;
mod stop;
mod style;
mod tell;
mod thinking;
mod verbs;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pmetal::memory::PoolAllocator;

/// Keeps large blocks between steps and counts what lives.
#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

/// Fine-tune large language models on the machine in front of you
#[derive(Parser)]
#[command(name = "pmetal", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Fine-tune a model on rows of text: a LoRA adapter, or every weight
    #[command(after_help = verbs::train::EXAMPLES)]
    Train(Box<verbs::train::Args>),
    /// Chat with a model, answer or continue a prompt, or a file of them
    #[command(after_help = verbs::infer::EXAMPLES)]
    Infer(Box<verbs::infer::Args>),
    /// Look at a dataset: preview what is trained, count it, convert it
    Data(verbs::data::Args),
    /// Write the logits of given token ids, to compare with another implementation
    #[command(after_help = verbs::logits::EXAMPLES)]
    Logits(verbs::logits::Args),
    /// Measure this machine
    Bench(verbs::bench::Args),
}

fn main() -> ExitCode {
    let verb = Cli::parse().verb;
    // on a thread of the pool, so that kernels need not wake it for each call
    let result = rayon::scope(|_| match &verb {
        Verb::Train(args) => verbs::train::run(args),
        Verb::Infer(args) => verbs::infer::run(args),
        Verb::Data(args) => verbs::data::run(args),
        Verb::Logits(args) => verbs::logits::run(args),
        Verb::Bench(args) => verbs::bench::run(args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // what templates and libraries say may have several lines
            let message = failure.to_string();
            let lines: Vec<&str> = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            tell::tell(format_args!("error: {}", lines.join(" ")));
            ExitCode::from(failure.exit_code())
        }
    }
}
