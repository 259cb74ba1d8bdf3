use std::path::PathBuf;

/// What goes wrong between an id and its files, or between a folder and the hub. Each says in one line what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is there under the name, and it is no id.
    #[error("{name} does not exist, and is no id of the hub either (those look like org/name): check the path")]
    NoSuchPath {
        /// What was given.
        name: String,
    },
    /// A text that has to be an id.
    #[error("'{text}' is no id of the hub: expected org/name, org/name@revision or org/name:file")]
    NotAnId {
        /// What was given.
        text: String,
    },
    /// Two revisions for one repository.
    #[error("{id} names a revision, and --revision {revision} another: leave one of them out")]
    TwoRevisions {
        /// The id as given.
        id: String,
        /// The other revision.
        revision: String,
    },
    /// A revision of a path.
    #[error("--revision {revision} is for ids of the hub, and {} is a path: leave it out", path.display())]
    RevisionOfPath {
        /// The path.
        path: PathBuf,
        /// The revision given.
        revision: String,
    },
    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is '{endpoint}', expected an address such as https://hub.example")]
    BadEndpoint {
        /// What it is.
        endpoint: String,
    },
    /// The token cannot be put into a header.
    #[error("the token in HF_TOKEN or in the token file has characters that no token has: copy it again")]
    BadToken,
    /// No network is allowed, and the cache has nothing.
    #[error("{what} is not in the cache {} and HF_HUB_OFFLINE is set: unset it once to download", cache.display())]
    Offline {
        /// Id and revision.
        what: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The hub does not answer.
    #[error("cannot reach {endpoint}: {reason}; check the connection or HF_ENDPOINT and run again")]
    Unreachable {
        /// The hub.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// The hub does not answer, and the cache has nothing.
    #[error("{what} is not in the cache, and {reason}; check the connection or HF_ENDPOINT and run again")]
    NotCached {
        /// Id and revision.
        what: String,
        /// Why the hub did not help.
        reason: String,
    },
    /// The cache has a part of a snapshot, and the rest cannot be had.
    #[error("the cached snapshot of {what} lacks {missing}, and {reason}: run again with the hub in reach")]
    Incomplete {
        /// Id and revision.
        what: String,
        /// The first missing file, and how many more.
        missing: String,
        /// Why the hub was not asked.
        reason: String,
    },
    /// No such repository, or none that this token may see.
    #[error("{endpoint} has no {kind} {id}{}: check the spelling of the id (or path){}", if *signed_in { " that your token may see" } else { "" },
            if *signed_in { "" } else { ", or set HF_TOKEN if it is private" })]
    RepoNotFound {
        /// The hub.
        endpoint: String,
        /// `model` or `dataset`.
        kind: &'static str,
        /// The id.
        id: String,
        /// Whether a token was sent.
        signed_in: bool,
    },
    /// No such branch, tag or commit.
    #[error("{id} has no revision '{revision}': see its branches and tags on {page}")]
    RevisionNotFound {
        /// The id.
        id: String,
        /// What was asked for.
        revision: String,
        /// The repository's page.
        page: String,
    },
    /// No such file.
    #[error("{id} has no file '{file}' at revision {revision}: see its files on {page}")]
    FileNotFound {
        /// The id.
        id: String,
        /// The file.
        file: String,
        /// Branch, tag or commit.
        revision: String,
        /// The repository's page.
        page: String,
    },
    /// A repository behind a licence.
    #[error("{id} is gated: accept its licence on {page} and set HF_TOKEN to a token of that account{}", said(message))]
    Gated {
        /// The id.
        id: String,
        /// The repository's page.
        page: String,
        /// The hub's own words.
        message: String,
    },
    /// The hub wants to know who asks.
    #[error("{id}: the hub asks who you are (401): {}{}",
            if *signed_in { "the token in HF_TOKEN or the token file is not valid, make a new one" }
            else { "set HF_TOKEN; a gated model also wants its licence accepted on its page" }, said(message))]
    Unauthorized {
        /// The id.
        id: String,
        /// Whether a token was sent.
        signed_in: bool,
        /// The hub's own words.
        message: String,
    },
    /// The hub knows who asks and refuses.
    #[error(
        "{id}: the hub refuses access (403): accept the licence on {page} if it is gated, and set HF_TOKEN to a token with the rights for this{}",
        said(message)
    )]
    Forbidden {
        /// The id.
        id: String,
        /// The repository's page.
        page: String,
        /// The hub's own words.
        message: String,
    },
    /// Too many requests.
    #[error("{endpoint} takes no more requests for now (429): try again in {seconds} s{}", if *signed_in { "" } else { "; with HF_TOKEN set the limits are higher" })]
    RateLimited {
        /// The hub.
        endpoint: String,
        /// How long it asked to wait.
        seconds: u64,
        /// Whether a token was sent.
        signed_in: bool,
    },
    /// Another refusal.
    #[error("{url} answers {status}{}", said(message))]
    Http {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
        /// The hub's own words.
        message: String,
    },
    /// A file that does not come whole.
    #[error(
        "{file}: the transfer broke off {failures} times in a row, the last time with: {reason}; run again to go on where it stopped"
    )]
    Transfer {
        /// The file.
        file: String,
        /// How often.
        failures: u32,
        /// The last failure.
        reason: String,
    },
    /// What came is not what was announced.
    #[error("{file}: {quantity} is {found}, the hub says {expected}: what was loaded is thrown away, run again")]
    Mismatch {
        /// The file.
        file: String,
        /// `sha256` or `length`.
        quantity: &'static str,
        /// What the hub announced.
        expected: String,
        /// What came.
        found: String,
    },
    /// An answer that makes no sense.
    #[error("{url} does not answer as a hub: {reason}; check HF_ENDPOINT and proxies")]
    Protocol {
        /// What was asked.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Weights only as pickles or in other formats.
    #[error(
        "{id} has no safetensors and no GGUF file (it has {found}): pickles are not read, look for a converted copy on the hub"
    )]
    NoWeights {
        /// The id.
        id: String,
        /// Files that may be weights.
        found: String,
    },
    /// Several GGUF files.
    #[error("{id} has several GGUF files: {files}; pick one with {id}:FILE.gguf")]
    SeveralGguf {
        /// The id.
        id: String,
        /// Their names.
        files: String,
    },
    /// `org/name:file` without such a file.
    #[error("{id} has no file for ':{file}': it has {files}")]
    NoSuchFile {
        /// The id.
        id: String,
        /// What was asked for.
        file: String,
        /// What there is.
        files: String,
    },
    /// A GGUF model in parts.
    #[error(
        "{id}: {file} is one part of a model in several files, which are not read: pick a file that is whole, or join the parts with llama-gguf-split --merge"
    )]
    SplitGguf {
        /// The id.
        id: String,
        /// The file.
        file: String,
    },
    /// A dataset without rows.
    #[error("{id} has no file of rows (.parquet, .jsonl, .json, .csv, .tsv, also .gz and .zst): it has {found}")]
    NoData {
        /// The id.
        id: String,
        /// What there is.
        found: String,
    },
    /// Patterns that leave nothing.
    #[error("{id}: no file is left by --include and --exclude; it has {found}")]
    NothingChosen {
        /// The id.
        id: String,
        /// What there is.
        found: String,
    },
    /// A pattern that is none.
    #[error("'{pattern}' is no file pattern: {reason}")]
    BadPattern {
        /// What was given.
        pattern: String,
        /// What is wrong.
        reason: String,
    },
    /// Someone asked to stop.
    #[error("stopped; what was loaded is kept, run again to go on from there")]
    Stopped,
    /// An upload without a token.
    #[error("an upload needs a token with write access: set HF_TOKEN")]
    NoToken,
    /// An upload without a network.
    #[error("HF_HUB_OFFLINE is set: unset it to upload")]
    OfflineUpload,
    /// A folder that is no model.
    #[error("{}: expected the folder of an adapter (adapter_config.json) or of a model (config.json, or a GGUF file)", path.display())]
    NothingToUpload {
        /// What was given.
        path: PathBuf,
    },
    /// A private upload into a public repository.
    #[error("{id} is there already and public: make it private in its settings, or leave out --private")]
    AlreadyPublic {
        /// The id.
        id: String,
    },
    /// A file of the folder that is to be uploaded is broken.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file or folder could not be read or written.
    #[error(transparent)]
    File(#[from] pmetal_core::Error),
}

/// The hub's own words behind ours.
fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (the hub says: {message})") }
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
