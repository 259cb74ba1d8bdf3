use std::{fmt, path::PathBuf};

/// What goes wrong between a file of rows and a batch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened or read.
    #[error("cannot read {}: {source}{}", path.display(), pmetal_core::next_step(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}{}", path.display(), pmetal_core::next_step(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// A model without a tokenizer.
    #[error(
        "{} has no tokenizer: a folder needs the model's tokenizer.json (transformers' AutoTokenizer writes it with save_pretrained), \
         a GGUF file the key tokenizer.ggml.tokens",
        path.display()
    )]
    NoTokenizer {
        /// The folder or file.
        path: PathBuf,
    },
    /// A file of a tokenizer that cannot be understood.
    #[error("{}: {reason}", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text or a list of ids.
    #[error("the tokenizer failed: {reason}")]
    Tokenize {
        /// The tokenizer's own words.
        reason: String,
    },
    /// The GGUF file with the tokenizer is broken.
    #[error(transparent)]
    Gguf(#[from] pmetal_gguf::Error),
    /// A chat template that is not valid Jinja, or that fails while it renders.
    #[error("chat template {template}{}: {reason}", line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Template {
        /// Where the template comes from.
        template: String,
        /// The line of the template, from 1.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that refuses the conversation with `raise_exception`.
    #[error("chat template {template} refuses the conversation: {message}")]
    Refused {
        /// Where the template comes from.
        template: String,
        /// The template's own words.
        message: String,
    },
    /// A conversation whose assistant turn cannot be found in what the template made of it.
    #[error(
        "chat template {template}: what the assistant says in message {message} (from 0) is not in the rendered text; \
         try --train-on last or all, or another --chat-template"
    )]
    TurnNotFound {
        /// Where the template comes from.
        template: String,
        /// Index of the message, from 0.
        message: usize,
    },
    /// `--chat-template` is neither a known name nor a file.
    #[error("no chat template '{name}': expected auto, {known} or a file")]
    UnknownTemplate {
        /// What was given.
        name: String,
        /// The names built in.
        known: &'static str,
    },
    /// `--train-on` with an unknown word.
    #[error("cannot train on '{name}': expected assistant, last or all")]
    UnknownTrainOn {
        /// What was given.
        name: String,
    },
    /// A row that cannot be used.
    #[error("{}:{place}: {fault}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// What is wrong with the row.
        fault: Box<RowFault>,
    },
    /// A dataset file of a kind that is not read.
    #[error("{}: expected a .jsonl or .json file of rows; convert it to one JSON object per line", path.display())]
    NotRows {
        /// The file or folder.
        path: PathBuf,
    },
    /// No row of the dataset has a token that would be trained.
    #[error("{}: nothing to train on in {rows} rows: {reasons}", path.display())]
    NothingToTrain {
        /// The file.
        path: PathBuf,
        /// Rows read.
        rows: usize,
        /// The first rows, each with its reason.
        reasons: String,
    },
}

/// What is wrong with one row.
#[derive(Debug, thiserror::Error)]
pub enum RowFault {
    /// Not JSON.
    #[error("bad JSON: {0}")]
    Json(String),
    /// JSON, and no object.
    #[error("expected a JSON object, found {0}")]
    NotObject(&'static str),
    /// An object with none of the keys a format is known by.
    #[error("no known format has the keys [{seen}]; known are {FORMATS}")]
    UnknownKeys {
        /// The keys of the row.
        seen: String,
    },
    /// A conversation without a turn.
    #[error("'{0}' is empty")]
    EmptyConversation(&'static str),
    /// A turn without the keys of its format.
    #[error("turn {turn} has the keys [{seen}], expected role and content, or from and value")]
    TurnKeys {
        /// Index of the turn, from 0.
        turn: usize,
        /// The keys it has.
        seen: String,
    },
    /// A turn of nobody we know.
    #[error("turn {turn} has the unknown role '{role}', expected one of {expected}")]
    UnknownRole {
        /// Index of the turn, from 0.
        turn: usize,
        /// The role found.
        role: String,
        /// Those known.
        expected: &'static str,
    },
    /// A value of the wrong kind.
    #[error("{key} is {found}, expected {expected}")]
    WrongKind {
        /// The key, with the turn it is in.
        key: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A key that the row's format needs.
    #[error("the key '{0}' is missing")]
    MissingKey(&'static str),
    /// `labels` of another length than `input_ids`.
    #[error("'labels' has {labels} entries, 'input_ids' has {input_ids}")]
    LabelsLength {
        /// Number of ids.
        input_ids: usize,
        /// Number of labels.
        labels: usize,
    },
    /// An id or label outside its range.
    #[error("'{key}' entry {index} is {found}, expected {expected}")]
    Id {
        /// `input_ids` or `labels`.
        key: &'static str,
        /// Index of the entry, from 0.
        index: usize,
        /// What it is.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An id the model does not know.
    #[error(
        "'{key}' entry {index} is {found}, the model knows the ids 0 to {}; was the row tokenized for another model?",
        vocab_size.saturating_sub(1)
    )]
    Vocabulary {
        /// `input_ids` or `labels`.
        key: &'static str,
        /// Index of the entry, from 0.
        index: usize,
        /// What it is.
        found: i64,
        /// How many ids there are.
        vocab_size: usize,
    },
    /// A row of text for a model without a tokenizer.
    #[error(
        "the model has no tokenizer, so rows need 'input_ids'; put its tokenizer.json into its folder to train on text"
    )]
    NoTokenizer,
    /// The row is well-formed and could not be rendered or tokenized.
    #[error(transparent)]
    Encode(Error),
}

/// The formats of rows and the keys they are known by.
const FORMATS: &str = "ShareGPT (conversations: from, value), Messages (messages: role, content), \
    Alpaca (instruction, input, output), text (text), pre-tokenized (input_ids, labels)";

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Line on which the row starts, from 1.
    pub line: usize,
    /// Index of the row within a JSON array, from 0; `None` in a file of JSON lines.
    pub element: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.element {
            Some(element) => write!(f, "{}: element {element}", self.line),
            None => write!(f, "{}", self.line),
        }
    }
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
