//! What a run reports: to whoever watches, and to `metrics.jsonl`.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use pmetal_hub::DownloadProgress;
use serde::Serialize;

use crate::Result;

/// One optimizer step.
#[derive(Clone, Debug, Serialize)]
pub struct StepMetrics {
    /// Steps taken, this one included.
    pub step: usize,
    /// Passes over the data so far, with the part of the present one.
    pub epoch: f64,
    /// Mean loss over the step's supervised tokens (nats).
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Supervised tokens seen so far.
    pub supervised_tokens: u64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// The most memory held at once so far, mapped weights included.
    pub peak_memory_bytes: u64,
}

/// One evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct EvalMetrics {
    /// Steps taken before it.
    pub step: usize,
    /// Passes over the data before it.
    pub epoch: f64,
    /// Mean loss over the supervised tokens of all evaluation rows (nats).
    pub eval_loss: f64,
    /// How many tokens that is.
    pub eval_tokens: u64,
}

/// Someone who watches a run.
pub trait Observer {
    /// `read` of the `total` bytes of a file of rows were read, and `rows` rows tokenized.
    fn reading(&mut self, _file: &Path, _read: u64, _total: u64, _rows: usize) {}
    /// The run is about to start.
    fn start(&mut self, _total_steps: usize) {}
    /// A step was taken.
    fn step(&mut self, _metrics: &StepMetrics) {}
    /// An evaluation was made.
    fn eval(&mut self, _metrics: &EvalMetrics) {}
    /// Something worth a line.
    fn note(&mut self, _line: &str) {}
    /// Who watches the downloads before the run.
    fn downloads(&self) -> &dyn DownloadProgress {
        &()
    }
}

/// Watches nothing.
impl Observer for () {}

/// `metrics.jsonl`: a line for every step and every evaluation, written as they come.
pub struct MetricsFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl MetricsFile {
    /// Starts the file anew. Fails where the folder cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(pmetal_core::Error::io("write", path))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::new(file) })
    }

    /// Appends a line.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(row).map_err(std::io::Error::other);
        let written = line.and_then(|line| writeln!(self.file, "{line}").and_then(|()| self.file.flush()));
        Ok(written.map_err(pmetal_core::Error::io("write", &self.path))?)
    }
}
