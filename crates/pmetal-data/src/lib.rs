//! Datasets, chat templates, loss masks, packing and batches: text in, token ids and labels out.
//!
//! The way of a row:
//!
//! 1. [`Dataset::load`] reads a file of rows, one at a time; the keys of a row tell its format: ShareGPT, Messages, Alpaca,
//!    prompt and completion, preferences, text or ids.
//! 2. A conversation is rendered by a [`Template`], as `transformers` renders it: the model's own, one that is built in, or a
//!    file ([`TemplateChoice`]).
//! 3. The [`Tokenizer`] makes ids of the text, and labels of what the assistant says in it ([`TrainOn`]): turn by turn,
//!    whatever the template, the end of the turn included. The result is an [`Example`].
//! 4. [`Sampler`] says which examples share a micro-batch, by length; with packing, which packs do ([`pack`]). There is no
//!    padding: a batch is rows one after another.

mod cache;
mod columns;
mod conversation;
mod dataset;
mod encode;
mod error;
mod examples;
mod look;
mod mask;
mod mix;
mod packing;
mod prompt;
mod reader;
mod report;
mod row;
mod sampler;
mod source;
mod stats;
mod store;
mod template;
mod tokenizer;
mod view;
mod writer;

pub use cache::CacheChoice;
pub use columns::ColumnMap;
pub use conversation::{Conversation, Message};
pub use dataset::{Dataset, DatasetOptions, Mix, Watch};
pub use encode::Example;
pub use error::{Error, Place, Result, RowFault};
pub use examples::Examples;
pub use look::{RowView, Words, convert, preview};
pub use mask::TrainOn;
pub use packing::{Packing, pack};
pub use prompt::Prompt;
pub use report::{DropReason, Dropped, Report};
pub use row::Format;
pub use sampler::Sampler;
pub use source::{Source, Split};
pub use stats::{Bin, Cut, Lengths, Stats};
pub use template::{Template, TemplateChoice};
pub use tokenizer::{StreamDecoder, TOKENIZER_FILES, Tokenizer};
pub use view::TokenView;
pub use writer::RowsFile;
