use std::path::{Path, PathBuf};

/// What goes wrong with models and their files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing at this path.
    #[error("{} does not exist; give a Hugging Face folder or a .gguf file", path.display())]
    NotFound {
        /// What was looked for.
        path: PathBuf,
    },
    /// A folder or file that holds no model.
    #[error(
        "{} is no model: expected a folder with config.json and model.safetensors (or its shards and their index), or a .gguf file; found {found}",
        path.display()
    )]
    NotAModel {
        /// The folder or file.
        path: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// A file cannot be read as what it is.
    #[error("{}: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A weights file ends too early.
    #[error("{} is truncated: {what} needs {expected} bytes, found {found}; fetch the file again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The header, or `tensor NAME`.
        what: String,
        /// Bytes it needs.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A family that is not in the registry.
    #[error(
        "{}: architecture {name} is not supported; known are {} (see `pmetal models`)",
        path.display(), known.join(", ")
    )]
    UnknownArchitecture {
        /// The file; `config.json` where the configuration did not come from one.
        path: PathBuf,
        /// What the configuration says.
        name: String,
        /// The model types there are.
        known: Vec<&'static str>,
    },
    /// A configuration says something impossible, or asks for something that is not supported.
    #[error("{}: {key}: {reason}", path.display())]
    Config {
        /// The file; `config.json` where the configuration did not come from one.
        path: PathBuf,
        /// The key at fault.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A scaling of rope that is asked for in place of the checkpoint's, and is none.
    #[error("--rope-scaling {text}: {reason}; give yarn:4, linear:2, dynamic:2, none, or a JSON object")]
    RopeScaling {
        /// What was asked for.
        text: String,
        /// Why it is none.
        reason: String,
    },
    /// A weight the configuration asks for is not there.
    #[error(
        "{}: tensor {tensor} is missing, expected {expected:?}; the download is incomplete, or config.json of another model: fetch both again",
        path.display()
    )]
    MissingTensor {
        /// The file, or the folder where there are several.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        expected: Vec<usize>,
    },
    /// A weight of another shape than the configuration says.
    #[error(
        "{}: tensor {tensor} is {found:?}, expected {expected:?}; weights and configuration are of different models: fetch both again",
        path.display()
    )]
    TensorShape {
        /// The file it is in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape after the configuration.
        expected: Vec<usize>,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// A weight of a dtype that is not supported.
    #[error("{}: tensor {tensor} is {found}, expected F32, F16 or BF16; take the model in one of these, or a GGUF file", path.display())]
    TensorDType {
        /// The file it is in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype in the file.
        found: String,
    },
    /// A weight the architecture has no place for: leaving it out would be another model.
    #[error(
        "{}: there is no place for tensor {tensor} in a {model_type} model; is config.json of another model?",
        path.display()
    )]
    ExtraTensor {
        /// The file it is in.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The family.
        model_type: String,
    },
    /// A model that this machine has no memory for.
    #[error(
        "a model of these sizes has {parameters} parameters, {needed} bytes; this machine has {memory} bytes of memory: correct config.json"
    )]
    TooLarge {
        /// Weights, counted.
        parameters: u128,
        /// Bytes they take.
        needed: u128,
        /// Bytes of memory there are.
        memory: u64,
    },
    /// The prompt leaves no room in the model's context.
    #[error(
        "the prompt has {prompt} tokens, the model's context {context}: shorten it by {} or more",
        (prompt + 1).saturating_sub(*context)
    )]
    Context {
        /// Tokens of the prompt.
        prompt: usize,
        /// `max_position_embeddings`.
        context: usize,
    },
    /// A row has no room left in the cache.
    #[error("row {row} would hold {needed} tokens, the cache has room for {capacity}")]
    CacheFull {
        /// The row.
        row: usize,
        /// Tokens it would hold.
        needed: usize,
        /// Places per row.
        capacity: usize,
    },
    /// Ids and lengths that do not fit together.
    #[error("input: {reason}")]
    Input {
        /// What does not fit.
        reason: String,
    },
    /// A sampling setting outside its range.
    #[error("{key} is {got}, expected {expected}")]
    Setting {
        /// The setting.
        key: &'static str,
        /// Its value.
        got: f64,
        /// What it must be.
        expected: &'static str,
    },
    /// The model computes no numbers.
    #[error("the model's logits are not finite after {tokens} tokens; try --dtype f32")]
    NotFinite {
        /// Tokens it had read.
        tokens: usize,
    },
    /// A GGUF file is at fault.
    #[error(transparent)]
    Gguf(#[from] pmetal_gguf::Error),
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

impl Error {
    /// The same with the file that a configuration came from.
    pub(crate) fn at(self, path: &Path) -> Self {
        let path = path.to_path_buf();
        match self {
            Self::Config { key, reason, .. } => Self::Config { path, key, reason },
            Self::UnknownArchitecture { name, known, .. } => Self::UnknownArchitecture { path, name, known },
            other => other,
        }
    }

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
