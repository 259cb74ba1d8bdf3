//! The quickstart's model, for tests inside the command.

use std::path::Path;

use clap::Parser;

use super::{Args, Engine, Voice};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

/// The quickstart's chat model.
pub fn base() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/quickstart/base").display().to_string()
}

/// Flags.
pub fn args(model: &str, more: &[&str]) -> Args {
    Cli::try_parse_from([&["infer", "--model", model], more].concat()).unwrap_or_else(|e| panic!("{e}")).args
}

/// The voice of a model without adapter.
pub fn open_voice(args: &Args) -> Voice {
    Voice::open(args, &args.model.checkpoint().unwrap(), None, true).unwrap()
}

/// A model, loaded.
pub fn engine(args: &Args) -> Engine {
    let checkpoint = args.model.checkpoint().unwrap();
    Engine::load(args, &checkpoint, open_voice(args), args.sampling(&checkpoint).unwrap()).unwrap()
}
