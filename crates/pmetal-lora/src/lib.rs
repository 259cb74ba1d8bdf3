//! LoRA adapters: which layers get one, how they start, and the files they live in.
//!
//! An adapter is a property of a linear layer, whatever model the layer belongs to: [`attach`] walks a model's linear layers and gives
//! each target an A and a B from one arena; [`AdapterFile`] reads what PEFT or [`save`] wrote, and [`attach_file`] puts it on a model,
//! strictly: a tensor too many, too few or of another shape is an error. The embedding and the head can be trained in full beside it
//! ([`ModulesToSave`]), and are saved with it.

mod attach;
mod config;
mod error;
mod experts;
mod peft;
mod tables;
mod targets;

pub use attach::{Use, adapter_tensors, attach, attach_file, detach};
pub use config::{LoraConfig, TargetModules};
pub use error::{Error, Result};
pub use peft::{AdapterFile, Base, SINGLE_FILE, save, saved};
pub use tables::ModulesToSave;
