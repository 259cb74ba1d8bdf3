//! The command as a user meets it: the built binary, run as a process.

mod add_tokens;
mod bench;
mod common;
mod data;
mod data_errors;
mod flag_errors;
mod infer;
mod infer_errors;
mod infer_files;
mod interrupt;
mod model_errors;
mod train;
mod train_full;
