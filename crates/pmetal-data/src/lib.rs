//! Datasets, chat templates, loss masks, packing and batches: text in, token ids and labels out.
//!
//! The way of a row:
//!
//! 1. [`Dataset::load`] reads a file of rows, one at a time; the keys of a row tell its format: ShareGPT, Messages, Alpaca, text
//!    or ids.
//! 2. A conversation is rendered by a [`Template`], as `transformers` renders it: the model's own, one that is built in, or a
//!    file ([`TemplateChoice`]).
//! 3. The [`Tokenizer`] makes ids of the text, and labels of what the assistant says in it ([`TrainOn`]): turn by turn,
//!    whatever the template, the end of the turn included. The result is an [`Example`].
//! 4. [`Sampler`] says which examples share a micro-batch, by length; with packing, which packs do ([`pack`]). There is no
//!    padding: a batch is rows one after another.

mod conversation;
mod dataset;
mod encode;
mod error;
mod mask;
mod mix;
mod packing;
mod reader;
mod row;
mod sampler;
mod template;
mod tokenizer;

pub use conversation::Message;
pub use dataset::{Dataset, DatasetOptions, DropReason, Dropped, Report, split};
pub use encode::Example;
pub use error::{Error, Place, Result, RowFault};
pub use mask::TrainOn;
pub use packing::{Packing, pack};
pub use sampler::Sampler;
pub use template::{Template, TemplateChoice};
pub use tokenizer::{StreamDecoder, TOKENIZER_FILES, Tokenizer};
