use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

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
    /// A format of rows that is not written.
    #[error(
        "no row format '{name}': expected messages, sharegpt, alpaca, text, prompt-completion, preference or tokens"
    )]
    UnknownFormat {
        /// What was given.
        name: String,
    },
    /// A row that cannot be used.
    #[error("{}:{}: {fault}", path.display(), place.behind_file())]
    Row {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// What is wrong with the row.
        fault: Box<RowFault>,
    },
    /// A dataset file of a kind that is not read.
    #[error("{}: expected rows in JSON, JSON lines, CSV, TSV, Parquet or plain text (also .gz or .zst), found {found}", path.display())]
    NotRows {
        /// The file or folder.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// A Parquet file that cannot be read as one.
    #[error("{} is no whole Parquet file: {reason}; fetch or write it again", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A folder without a file that could be rows.
    #[error("{} has no file of rows: expected files that end in {endings} (also with .gz or .zst)", path.display())]
    NoRowsIn {
        /// The folder.
        path: PathBuf,
        /// The endings of files of rows.
        endings: String,
    },
    /// A folder without a part that was asked for.
    #[error("{} has no files of '{split}' (their names, or their folder's, begin with that word); name a file", path.display())]
    NoSplit {
        /// The folder.
        path: PathBuf,
        /// The part.
        split: &'static str,
    },
    /// A folder with training files in several folders.
    #[error("{} holds several datasets, in {} and in {}: name one of the folders", path.display(), first.display(), second.display())]
    SeveralDatasets {
        /// The folder.
        path: PathBuf,
        /// A folder in it.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },
    /// A file of rows to be written whose ending is none of those known.
    #[error("{}: rows are written as .jsonl, .json, .csv or .tsv (with .gz or .zst behind it, too)", path.display())]
    OutputKind {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be written in its place.
    #[error(transparent)]
    File(#[from] pmetal_core::Error),
    /// `--columns` that cannot be understood.
    #[error("--columns: {reason}; expected pairs such as instruction=question,output=answer")]
    Columns {
        /// What is wrong.
        reason: String,
    },
    /// The cache of tokenized rows cannot be written.
    #[error("cannot keep tokenized rows in {}: {source}; name another folder in PMETAL_CACHE, or add --no-cache", path.display())]
    Cache {
        /// The folder.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// Reading was stopped by who watched it.
    #[error("interrupted while the dataset was read; nothing was written")]
    Interrupted,
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
    /// A row of more bytes than any row has.
    #[error("the row is longer than {limit} bytes; a row is one line, or an element of a JSON array")]
    TooLong {
        /// The most there may be.
        limit: u64,
    },
    /// A record of a table that cannot be read.
    #[error("{0}")]
    Table(String),
    /// Text in another encoding.
    #[error("no UTF-8 at byte {byte} of the line; save the file as UTF-8")]
    Encoding {
        /// Counted from 0.
        byte: usize,
    },
    /// A column that `--columns` names and the row lacks.
    #[error("there is no column '{column}'; the row has {columns}")]
    NoColumn {
        /// The column.
        column: String,
        /// Those there are.
        columns: String,
    },
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
    /// A part of a content that is neither text nor reasoning.
    #[error("turn {turn}: 'content' entry {index} is of type '{kind}'; only text and reasoning are trained on so far")]
    Part {
        /// Index of the turn, from 0.
        turn: usize,
        /// Index of the part, from 0.
        index: usize,
        /// Its type.
        kind: String,
    },
    /// A part of a content without the keys of one.
    #[error("turn {turn}: 'content' entry {index} has the keys [{seen}], expected type and text")]
    PartKeys {
        /// Index of the turn, from 0.
        turn: usize,
        /// Index of the part, from 0.
        index: usize,
        /// The keys it has.
        seen: String,
    },
    /// A weight between trained and not trained.
    #[error("turn {turn}: 'weight' is {found}, expected 0 (not trained) or 1")]
    Weight {
        /// Index of the turn, from 0.
        turn: usize,
        /// The weight found.
        found: String,
    },
    /// A tool call that does not say which tool.
    #[error("{key} has no 'name', expected a call as {{\"name\": …, \"arguments\": {{…}}}}")]
    CallWithoutName {
        /// The turn and key.
        key: String,
    },
    /// A row of compared answers where one answer is needed.
    #[error(
        "a preference row ({keys}); supervised fine-tuning needs rows with one answer: \
         messages, conversations, or prompt and completion{hint}"
    )]
    Preference {
        /// The keys that make it one.
        keys: &'static str,
        /// How to train on the better answers, if a mapping of columns does it.
        hint: &'static str,
    },
    /// A row that another format cannot hold.
    #[error("the row cannot be written as {format}: {reason}")]
    DoesNotFit {
        /// The format.
        format: String,
        /// What has no place.
        reason: String,
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
    /// A row of prompts without one.
    #[error(
        "has the keys [{seen}], expected prompt (a text to continue or, with --chat, to answer) or messages (role, content)"
    )]
    NoPrompt {
        /// The keys of the row.
        seen: String,
    },
    /// A conversation that a model is to answer, and that ends with an answer.
    #[error("the last turn is by '{role}', expected user or tool: what is to be answered comes last")]
    NothingToAnswer {
        /// Who said the last turn.
        role: String,
    },
    /// The row is well-formed and could not be rendered or tokenized.
    #[error(transparent)]
    Encode(Error),
}

/// The formats of rows and the keys they are known by.
const FORMATS: &str = "ShareGPT (conversations: from, value), Messages (messages: role, content), \
    Alpaca (instruction, input, output), prompt and completion, preferences (chosen, rejected), text (text), \
    pre-tokenized (input_ids, labels)";

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// On this line, from 1.
    Line(usize),
    /// In a JSON array.
    Element {
        /// The line on which it starts, from 1.
        line: usize,
        /// Its index in the array, from 0.
        element: usize,
    },
    /// This row of a Parquet file, from 0.
    Row(usize),
}

impl Place {
    /// As it stands behind a file's name and a colon.
    fn behind_file(self) -> String {
        match self {
            Self::Line(line) => line.to_string(),
            Self::Element { line, element } => format!("{line}: element {element}"),
            Self::Row(row) => format!(" row {row}"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Element { line, element } => write!(f, "line {line}, element {element}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

impl RowFault {
    pub(crate) fn utf8(error: std::str::Utf8Error) -> Self {
        Self::Encoding { byte: error.valid_up_to() }
    }
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
