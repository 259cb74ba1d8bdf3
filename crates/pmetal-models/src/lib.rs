//! One decoder, many families: configs, weights, KV cache, generation.
//!
//! A [`Checkpoint`] is a model on disk; [`load`] makes it a [`CausalLMModel`], [`random`] makes one from a configuration alone. A family is
//! one file that turns a Hugging Face `config.json` into a [`DecoderSpec`]; the decoder itself never asks which family it is. The model's
//! forward serves training, prefill and decoding: the [`KvCache`] is handed in.
//!
//! ```
//! use candle_core::{DType, Device};
//! use pmetal_models::{Input, random};
//!
//! # fn main() -> pmetal_models::Result<()> {
//! let config = serde_json::json!({
//!     "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12,
//!     "num_hidden_layers": 1, "num_attention_heads": 2,
//! });
//! let model = random(&config, DType::F32, &Device::Cpu, 0, None)?;
//! // two rows behind one another, of three and of two tokens
//! let hidden = model.forward(&Input::rows(&[1, 2, 3, 4, 5], &[3, 2]), None)?;
//! let logits = model.logits(hidden.tensor())?;
//! assert_eq!(logits.dims(), [5, 16]);
//! # Ok(())
//! # }
//! ```

mod cache;
mod checkpoint;
mod config;
mod decoder;
mod dequantize;
mod dispatcher;
mod error;
mod families;
mod generation;
mod generation_config;
mod gguf_config;
mod keys;
mod model;
mod names;
mod registry;
mod rope_spec;
mod safetensors_folder;
mod sampling;
mod save;
mod spec;
mod stored;
mod vocabulary;
mod weights;

pub use cache::KvCache;
pub use checkpoint::Checkpoint;
pub use config::{dtype_of, read_config, unused_dropout};
pub use decoder::{Checkpointing, OneToken, linear_layers, parameters_of, tensors_of};
pub use dispatcher::{load, random, refuse_too_large, spec_of, text_config};
pub use error::{Error, Result};
pub use generation::{Event, Generation, Session, StopReason, generate};
pub use generation_config::GenerationConfig;
pub use model::{CausalLMModel, Input};
pub use names::{EMBEDDING, ExpertFiles, HEAD, Names};
pub use registry::{Family, Holder, known_architectures, known_families};
pub use rope_spec::{ByLength, Frequencies, ROPE_SCALING_KINDS, RopeSpec, override_rope_scaling};
pub use sampling::{Logprobs, Sampler, SamplingParams};
pub use save::save_pretrained;
pub use spec::{
    AttentionBias, AttentionKind, DecoderSpec, ExpertsSpec, GatedSpec, HeadNorm, HeadsSpec, IndexerSpec, LatentSpec,
    LayerSpec, MlpSpec, NormPlaces, NormSpec, RopeUse, RouterBias, Temperature,
};
pub use stored::{in_halves, in_turn};
pub use vocabulary::resize_table;
