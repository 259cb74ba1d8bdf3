//! One file per verb: its flags, and what it prints.

pub mod bench;
pub mod data;
mod failure;
pub mod infer;
pub mod logits;
mod model_args;
pub mod train;

pub use failure::{Failure, Result};
use model_args::ModelArgs;
