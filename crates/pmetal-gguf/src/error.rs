use std::path::PathBuf;

/// What can be wrong with a GGUF file. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened or mapped.
    #[error(transparent)]
    Io(#[from] pmetal_core::Error),
    /// The first four bytes are not `GGUF`.
    #[error(
        "{} is not a GGUF file: it {}, expected 'GGUF'; download it again",
        path.display(), pmetal_core::what_it_is(found).map_or(format!("starts with {found:02x?}"), |kind| format!("is {kind}"))
    )]
    Magic {
        /// The file.
        path: PathBuf,
        /// Its first four bytes.
        found: [u8; 4],
    },
    /// A version this reader does not know.
    #[error("{}: GGUF version {found} is not known, expected 2 or 3 (little-endian); convert the model again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it states.
        found: u32,
    },
    /// The file ends inside something.
    #[error(
        "{} is truncated: {what} needs {expected} bytes from offset {offset}, found {found}; download it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What was being read: a header field, a key, `tensor 'name'`.
        what: String,
        /// Where it starts, in bytes from the start of the file.
        offset: u64,
        /// Bytes it needs from there.
        expected: u64,
        /// Bytes there are from there.
        found: u64,
    },
    /// A header field, key or tensor says something impossible.
    #[error("{}: {what}: expected {expected}, found {found}; download or convert it again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The field, key or tensor at fault.
        what: String,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor in a block format that cannot be decoded.
    #[error(
        "{}: tensor '{tensor}' has block type {id}, which is not known; known are {known}: take a file in one of these",
        path.display()
    )]
    BlockType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// ggml's number of the type.
        id: u32,
        /// The names of those known.
        known: String,
    },
    /// A metadata key that must be there is not.
    #[error("{}: metadata key '{key}' is missing; download or convert it again", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A tensor that must be there is not.
    #[error("{}: tensor '{tensor}' is missing; download or convert it again", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The tensor, under its name in the file.
        tensor: String,
    },
    /// One of several known things was expected: an architecture, a tokenizer, a pre-tokenizer.
    #[error("{}: {what} '{found}' is not known; known are {known}; {}", path.display(), way_around(what))]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What is named: `architecture`, `tokenizer model`, `pre-tokenizer`.
        what: &'static str,
        /// The name in the file.
        found: String,
        /// Those known.
        known: String,
    },
    /// A valid file of a kind that is not supported.
    #[error("{}: {what} is not supported; take another model, or its Hugging Face folder", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported, and what to do instead where something can be done.
        what: String,
    },
    /// The tokenizer in the metadata cannot be built.
    #[error("{}: the tokenizer in the metadata cannot be built: {reason}; download or convert it again", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// The tokenizer library's own words.
        reason: String,
    },
    /// A tensor could not be made.
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor, under its name in the file.
        tensor: String,
        /// candle's own words.
        source: Box<candle_core::Error>,
    },
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about something that is not known.
fn way_around(what: &str) -> &'static str {
    match what {
        "architecture" => "`pmetal models` lists the families",
        "tokenizer model" | "pre-tokenizer" => "put the model's tokenizer.json beside it and give the folder",
        _ => "take another model",
    }
}
