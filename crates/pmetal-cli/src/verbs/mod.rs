//! One file per verb: its flags, and what it prints.

pub mod bench;
pub mod completions;
pub mod data;
pub mod doctor;
pub mod download;
mod failure;
pub mod infer;
pub mod logits;
pub mod man;
mod model_args;
pub mod models;
pub mod train;
pub mod upload;

pub use failure::{Failure, Result};
use model_args::ModelArgs;
