//! Everything of PMetal that reads a file a user brings, as one function of bytes per kind of file.
//!
//! A test-only crate: each function writes its bytes to a file, opens it as the command would and asks it everything. Whatever the
//! bytes are, it returns: no panic, no hang, and no more memory than a small multiple of the bytes. `tests/` runs the functions
//! on damaged copies of the seeds in `fuzz/corpus` at every `cargo test`; the `cargo fuzz` targets in `fuzz/` run the same
//! functions for as long as one likes.
//!
//! The functions return whether the file was taken, so that a test can tell that its seeds are good.

mod damage;
mod scratch;
mod targets;

pub use damage::Damage;
pub use targets::{Target, adapter, config, gguf, jsonl, safetensors, targets, template, tokenizer};
