use std::path::{Path, PathBuf};

/// What goes wrong with adapters.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing at this path is an adapter.
    #[error(
        "{} is no adapter: expected a folder with adapter_config.json and adapter_model.safetensors, or a lora_weights.safetensors file; \
         {found}",
        path.display()
    )]
    NotAnAdapter {
        /// What was given.
        path: PathBuf,
        /// What is there instead, and what to do.
        found: &'static str,
    },
    /// A file of the adapter cannot be read as what it is.
    #[error("{}: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The adapter uses something that is not supported.
    #[error("{}: {what} is not supported; use an adapter without it", path.display())]
    Unsupported {
        /// The configuration.
        path: PathBuf,
        /// The setting, as `key = value`.
        what: String,
    },
    /// The adapter was made for a model of other layers.
    #[error("adapter {} does not fit this model: {reason}; it was trained on {base}: give that as --model", path.display())]
    OtherModel {
        /// The adapter.
        path: PathBuf,
        /// The tensor at fault, what was expected and what found.
        reason: String,
        /// The base model it records.
        base: String,
    },
    /// No linear layer has one of the asked names.
    #[error("no linear layer of this model is called {}; it has {}", targets.join(", "), known.join(", "))]
    NoTarget {
        /// The names that match nothing.
        targets: Vec<String>,
        /// The last parts of the names of the model's linear layers.
        known: Vec<String>,
    },
    /// A module that cannot be trained in full beside an adapter.
    #[error("modules_to_save: {name} cannot be trained beside an adapter; known are embed_tokens, lm_head")]
    UnknownModule {
        /// The name.
        name: String,
    },
    /// The head alone, where it is the embedding.
    #[error(
        "modules_to_save: the head of this model is its embedding, so lm_head cannot be trained alone: name embed_tokens, which trains both"
    )]
    TiedHead,
    /// A setting outside its range.
    #[error("{key} is {got}, expected {expected}")]
    Setting {
        /// The setting.
        key: &'static str,
        /// Its value.
        got: String,
        /// What it must be.
        expected: &'static str,
    },
    /// The model does not take a table.
    #[error(transparent)]
    Model(Box<pmetal_models::Error>),
    /// An operation failed.
    #[error(transparent)]
    Ops(#[from] pmetal_ops::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] pmetal_core::Error),
    /// The tensor library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<pmetal_models::Error> for Error {
    fn from(error: pmetal_models::Error) -> Self {
        Self::Model(Box::new(error))
    }
}

impl Error {
    pub(crate) fn broken(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Broken { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

impl Error {
    /// Whether the device's memory was full.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Ops(error) => error.is_out_of_memory(),
            Self::Candle(error) => pmetal_ops::device::is_out_of_memory(error),
            _ => false,
        }
    }
}
