//! The command as a user meets it: the built binary, run as a process.

mod bench;
mod common;
mod data_errors;
mod flag_errors;
mod hub;
#[path = "../../../pmetal-hub/tests/server/mod.rs"]
mod hub_server;
mod infer;
mod interrupt;
mod model_errors;
mod train;
mod train_full;
