//! The command as a user meets it: the built binary, run as a process.

mod add_tokens;
mod bench;
mod common;
mod data;
mod data_errors;
mod doctor;
mod flag_errors;
mod gguf_bytes;
mod hub;
#[path = "../../../pmetal-hub/tests/server/mod.rs"]
mod hub_server;
mod infer;
mod infer_errors;
mod infer_files;
mod interrupt;
mod malformed_adapters;
mod malformed_configs;
mod malformed_gguf;
mod malformed_tokenizers;
mod malformed_weights;
mod model_errors;
mod rope_scaling;
mod terminal;
mod train;
mod train_full;
