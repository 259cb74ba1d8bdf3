//! Which rows, and how they become tokens: the flags that `pmetal train` and `pmetal data` share.

use std::path::{Path, PathBuf};

use clap::Args;
use pmetal_data::{CacheChoice, ColumnMap, DatasetOptions, Mix, Source, Split, Template, TemplateChoice, TrainOn};
use pmetal_hub::{DownloadProgress, Kind, locate};

use crate::{Error, Result};

/// Options of a dataset.
#[derive(Clone, Debug, Args)]
pub struct DataOptions {
    /// Rows: a .jsonl, .json, .parquet, .csv, .tsv or .txt file (also .gz, .zst), a folder of them with train, valid and test files, or an
    /// id of the hub (org/name). May be given several times
    #[arg(long, visible_aliases = ["data", "dataset-name"], value_name = "PATH|ID", required = true, help_heading = "Input")]
    pub dataset: Vec<PathBuf>,
    /// How often the rows of each --dataset occur in an epoch: 2 is each twice, 0.5 every second one
    #[arg(long, value_name = "WEIGHTS", value_delimiter = ',', help_heading = "Input")]
    pub dataset_weights: Vec<f64>,
    /// Which columns are which keys of a row, such as instruction=question,output=answer; other columns are left out
    #[arg(long, value_name = "KEY=COLUMN,…", help_heading = "Input")]
    pub columns: Option<ColumnMap>,
    /// Read at most this many rows of each file
    #[arg(long, value_name = "ROWS", help_heading = "Input")]
    pub max_samples: Option<usize>,
    /// Which turns are trained: assistant, last (its last turn alone), all (every token)
    #[arg(long, default_value = "assistant", value_name = "TURNS", help_heading = "Input")]
    pub train_on: TrainOn,
    /// Chat template: auto (the model's own), the name of a built-in one, or a Jinja file
    #[arg(long, default_value = "auto", value_name = "NAME|FILE", help_heading = "Input")]
    pub chat_template: TemplateChoice,
    /// Rows are cut to this many tokens; 0 keeps them whole. With packing, the length of a pack
    #[arg(long, visible_aliases = ["max-length", "max-seq-length"], default_value_t = 0, value_name = "TOKENS", help_heading = "Input")]
    pub max_seq_len: usize,
    /// Keep the tokenized rows for this run alone, in a temporary folder
    #[arg(long, help_heading = "Input")]
    pub no_cache: bool,
}

impl DataOptions {
    /// Refuses values outside their range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |option, reason: String| Err(Error::Option { option, reason });
        let (weights, datasets) = (&self.dataset_weights, self.dataset.len());
        if !weights.is_empty() && weights.len() != datasets {
            let reason = format!("{} weights for {datasets} datasets: give one for each --dataset", weights.len());
            return refuse("--dataset-weights", reason);
        }
        const MOST: f64 = 1000.0;
        if let Some(weight) = weights.iter().find(|&&weight| !(weight > 0.0 && weight <= MOST)) {
            return refuse("--dataset-weights", format!("{weight} is not above 0 and at most {MOST}"));
        }
        if self.max_samples == Some(0) {
            return refuse("--max-samples", "must be at least 1".into());
        }
        Ok(())
    }

    /// Everything about the rows but where they are.
    pub fn dataset_options(&self, template: Template, vocab_size: usize) -> DatasetOptions {
        DatasetOptions {
            train_on: self.train_on,
            max_seq_len: self.max_seq_len,
            columns: self.columns.clone().unwrap_or_default(),
            max_samples: self.max_samples,
            cache: if self.no_cache { CacheChoice::Temporary } else { CacheChoice::default() },
            ..DatasetOptions::new(template, vocab_size)
        }
    }

    /// The files of every `--dataset` with their weights; those named by an id of the hub are downloaded.
    pub fn mix(&self, seed: u64, progress: &dyn DownloadProgress) -> Result<Mix> {
        let weights = self.dataset_weights.iter().copied().chain(std::iter::repeat(1.0));
        let parts = self.dataset.iter().zip(weights).map(|(path, weight)| Ok((find(path, progress)?, weight)));
        Ok(Mix { parts: parts.collect::<Result<_>>()?, split: Split::Train, seed })
    }
}

/// The files of a dataset named by its path or its id on the hub.
pub(crate) fn find(named: &Path, progress: &dyn DownloadProgress) -> Result<Source> {
    Ok(Source::find(&locate(Kind::Dataset, named, None, progress)?)?)
}
