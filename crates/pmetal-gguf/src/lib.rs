//! GGUF files as base models, read-only: block codecs, tensor names, configuration and tokenizer out of one file.
//!
//! [`GgufFile::open`] maps a file and checks every extent in its header. From there on it reads like a Hugging Face folder:
//! [`GgufFile::hf_config`] is its `config.json`, [`GgufFile::hf_tensors`], [`GgufFile::hf_tensor`] and [`GgufFile::hf_slice`] are its weights,
//! [`GgufFile::tokenizer`], [`GgufFile::special_tokens`] and [`GgufFile::chat_template`] the rest.
//!
//! ```no_run
//! let file = pmetal_gguf::GgufFile::open("model.gguf")?;
//! let config = file.hf_config()?;
//! for (name, shape) in file.hf_tensors()? {
//!     let weight = file.hf_tensor(&name, candle_core::DType::BF16)?;
//!     assert_eq!(weight.dims(), shape);
//! }
//! let ids = file.tokenizer()?.encode("Hello", true).map(|encoding| encoding.get_ids().to_vec());
//! # Ok::<(), pmetal_gguf::Error>(())
//! ```

mod architecture;
mod block;
mod config;
mod cursor;
mod dequantize;
mod error;
mod families;
mod file;
mod metadata;
mod names;
mod rope;
mod special_tokens;
mod tokenizer;
mod weights;

pub use architecture::{ARCHITECTURES, architectures_of};
pub use error::{Error, Result};
pub use file::{GgufFile, TensorInfo, gguf_files_in};
pub use special_tokens::{SpecialToken, SpecialTokens};
