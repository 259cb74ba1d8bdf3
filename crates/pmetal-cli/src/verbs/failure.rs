use pmetal::{core, data, hub, lora, models, ops, trainer};

/// Why a verb stopped: one line for the person at the terminal.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Flags that do not go together.
    #[error("{0}")]
    Usage(String),
    /// A model.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// Rows, tokenizer, template.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// An adapter.
    #[error(transparent)]
    Lora(#[from] lora::Error),
    /// A run.
    #[error(transparent)]
    Train(#[from] trainer::Error),
    /// The hub.
    #[error(transparent)]
    Hub(#[from] hub::Error),
    /// An operation.
    #[error(transparent)]
    Ops(#[from] ops::Error),
    /// A file.
    #[error(transparent)]
    File(#[from] core::Error),
    /// The tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A file that is not what it should be.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A row of a file, by its place.
    #[error("{place}: {reason}")]
    Row {
        /// The file and the line.
        place: String,
        /// What is wrong with the row.
        reason: String,
    },
    /// Kernels that do not do what they should.
    #[error("{0}")]
    Kernels(String),
    /// Ctrl-C before the work was done.
    #[error("interrupted: {0}")]
    Interrupted(String),
    /// Printing failed: the reader of a pipe went away.
    #[error("cannot write the result: {0}")]
    Output(#[from] std::io::Error),
}

/// Results of verbs.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// Whether whoever read the results has gone, having seen enough: `pmetal models | head -1`.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// Whether a GPU's memory was full.
    fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Model(error) => error.is_out_of_memory(),
            Self::Lora(error) => error.is_out_of_memory(),
            Self::Train(error) => error.is_out_of_memory(),
            Self::Ops(error) => error.is_out_of_memory(),
            Self::Candle(error) => ops::device::is_out_of_memory(error),
            _ => false,
        }
    }

    /// What a person is told, in a line.
    pub fn told(&self) -> String {
        if self.is_out_of_memory() {
            return "the GPU's memory is full: give a step fewer or shorter rows (--batch-size, --max-seq-len), keep less of them \
                    (--gradient-checkpointing), or use --device cpu"
                .into();
        }
        self.to_string()
    }

    /// 2 for bad usage, 130 after Ctrl-C, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Train(trainer::Error::Option { .. }) => 2,
            Self::Model(e) | Self::Train(trainer::Error::Model(e))
                if matches!(e, models::Error::RopeScaling { .. }) =>
            {
                2
            }
            Self::Interrupted(_) => 130,
            Self::Hub(e) | Self::Train(trainer::Error::Hub(e)) if is_usage(e) => 2,
            _ => 1,
        }
    }
}

/// Whether the flags were wrong whatever the hub has.
fn is_usage(error: &hub::Error) -> bool {
    use hub::Error::{BadPattern, NotAnId, RevisionOfPath, TwoRevisions};
    matches!(error, BadPattern { .. } | NotAnId { .. } | RevisionOfPath { .. } | TwoRevisions { .. })
}
