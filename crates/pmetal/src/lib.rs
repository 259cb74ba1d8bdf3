//! Fine-tune large language models on the machine in front of you.
//!
//! The parts, from text to adapter: [`data`] turns rows into token ids and masks, [`models`] turns ids into hidden states through the
//! operations of [`ops`], [`trainer`] turns losses into better parameters, [`lora`] puts adapters on layers and on disk. [`hub`] finds
//! models and datasets by id, [`gguf`] reads quantized base models; [`core`] chooses devices and dtypes.

pub use pmetal_core as core;
pub use pmetal_data as data;
pub use pmetal_gguf as gguf;
pub use pmetal_hub as hub;
pub use pmetal_lora as lora;
pub use pmetal_models as models;
pub use pmetal_ops as ops;
pub use pmetal_ops::memory;
pub use pmetal_trainer as trainer;
