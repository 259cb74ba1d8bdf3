//! One file per verb: its flags, and what it prints.

pub mod bench;
mod failure;
pub mod infer;
pub mod logits;
pub mod train;

pub use failure::{Failure, Result};
