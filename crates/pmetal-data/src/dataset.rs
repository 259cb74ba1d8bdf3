use std::{ops::ControlFlow, path::Path, sync::Arc};

use rayon::prelude::*;
use serde_json::Value;

use crate::{
    cache::{CacheChoice, key},
    columns::ColumnMap,
    encode::{Example, RowEncoder},
    error::{Error, Place, Result, RowFault},
    examples::Examples,
    mask::TrainOn,
    reader::{for_each_row, size_of},
    report::{Counts, DropReason, Report, name},
    row::Row,
    source::{Source, Split},
    store::{Store, StoreWriter},
    template::Template,
    tokenizer::Tokenizer,
};

/// Rows tokenized at a time: enough for all threads, few enough to hold beside the tokens.
const CHUNK_ROWS: usize = 2048;
/// Characters tokenized at a time: rows may be long.
const CHUNK_BYTES: usize = 8 << 20;

/// Tokenized rows, in the order of their files.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The rows with something to train.
    pub examples: Examples,
    /// What became of the files.
    pub report: Report,
}

/// How rows become examples.
#[derive(Debug, Clone)]
pub struct DatasetOptions {
    /// Which turns are trained.
    pub train_on: TrainOn,
    /// The templates conversations are rendered with.
    pub template: Template,
    /// Longer rows are cut to this many tokens; 0 keeps them whole.
    pub max_seq_len: usize,
    /// Ids the model knows: a row with one from here on is refused.
    pub vocab_size: usize,
    /// Which columns are which keys.
    pub columns: ColumnMap,
    /// At most this many rows of each file are read.
    pub max_samples: Option<usize>,
    /// Where the tokens go.
    pub cache: CacheChoice,
}

impl DatasetOptions {
    /// What a run does unless told otherwise.
    pub fn new(template: Template, vocab_size: usize) -> Self {
        Self {
            train_on: TrainOn::default(),
            template,
            max_seq_len: 0,
            vocab_size,
            columns: ColumnMap::default(),
            max_samples: None,
            cache: CacheChoice::default(),
        }
    }
}

/// Someone who watches rows being read.
pub trait Watch {
    /// `read` of the `total` bytes of a file were read and `rows` rows tokenized. [`ControlFlow::Break`] ends it with
    /// [`Error::Interrupted`].
    fn reading(&mut self, _file: &Path, _read: u64, _total: u64, _rows: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Watches nothing.
impl Watch for () {}

/// Files that are read as one, some more often than others.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// Each source, and how often its rows occur: 2 is twice each, 0.5 every second one.
    pub parts: Vec<(Source, f64)>,
    /// The part of each source.
    pub split: Split,
    /// Chooses the rows where a weight is no whole number.
    pub seed: u64,
}

impl From<Source> for Mix {
    fn from(source: Source) -> Self {
        Self { parts: vec![(source, 1.0)], split: Split::Train, seed: 0 }
    }
}

impl Dataset {
    /// Reads and tokenizes files, or finds again what was tokenized before. Rows with nothing to train are left out and reported. Without a
    /// tokenizer, rows have to be ids.
    ///
    /// Memory does not grow with the files: tokens lie on disk, in [`DatasetOptions::cache`].
    ///
    /// # Errors
    /// When a file cannot be read, at the first broken row, when the cache cannot be written, and when no row has anything to train.
    pub fn load<'a>(
        mix: &Mix,
        tokenizer: impl Into<Option<&'a Tokenizer>>,
        options: &DatasetOptions,
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        let tokenizer = tokenizer.into();
        let loader = Loader {
            encoder: RowEncoder::new(tokenizer, &options.template, options.train_on),
            settings: settings(tokenizer, options),
            options,
        };
        let mut dataset = Self::default();
        for (place, (source, weight)) in mix.parts.iter().enumerate() {
            let mut part = Self::default();
            for file in source.files(mix.split)? {
                let (examples, report) = loader.load(&file, watch)?;
                part.examples.append(examples);
                part.report.add(report);
            }
            if part.examples.is_empty() {
                let (rows, reasons) = (part.report.rows, part.report.reasons());
                return Err(Error::NothingToTrain { path: source.name().to_path_buf(), rows, reasons });
            }
            if *weight != 1.0 {
                part.examples = part.examples.weighted(*weight, mix.seed.wrapping_add(place as u64));
            }
            dataset.examples.append(part.examples);
            dataset.report.add(part.report);
        }
        Ok(dataset)
    }
}

/// Everything but the file that decides what becomes of it.
fn settings(tokenizer: Option<&Tokenizer>, options: &DatasetOptions) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    let mut add = |part: &str| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    };
    add(env!("CARGO_PKG_VERSION"));
    add(&format!("{:?} {} {:?}", options.train_on, options.vocab_size, options.max_samples));
    add(&options.columns.to_string());
    add(&tokenizer.map(Tokenizer::in_words).unwrap_or_default());
    options.template.describe(&mut add);
    hasher
}

struct Loader<'a> {
    encoder: RowEncoder<'a>,
    settings: blake3::Hasher,
    options: &'a DatasetOptions,
}

impl Loader<'_> {
    fn load(&self, file: &Path, watch: &mut dyn Watch) -> Result<(Examples, Report)> {
        let (key, cache) = (key(file, &self.settings)?, &self.options.cache);
        if let Some(store) = cache.find(&key) {
            return Examples::stored(Arc::new(store), self.options.max_seq_len, None);
        }
        let staged = cache.start()?;
        self.tokenize(file, staged.path(), watch)?;
        let (store, folder): (Store, _) = cache.keep(staged, &key)?;
        Examples::stored(Arc::new(store), self.options.max_seq_len, folder)
    }

    fn tokenize(&self, file: &Path, folder: &Path, watch: &mut dyn Watch) -> Result<()> {
        let total = size_of(file)?;
        let mut chunks = Chunks {
            loader: self,
            file,
            writer: StoreWriter::create(folder)?,
            counts: Counts::default(),
            rows: Vec::new(),
            bytes: 0,
        };
        let mut taken = 0;
        for_each_row(file, &mut |row| {
            if Some(taken) == self.options.max_samples {
                return Ok(ControlFlow::Break(()));
            }
            taken += 1;
            chunks.bytes += size_of_value(&row.value);
            chunks.rows.push((row.place, row.value));
            if chunks.rows.len() < CHUNK_ROWS && chunks.bytes < CHUNK_BYTES {
                return Ok(ControlFlow::Continue(()));
            }
            chunks.encode()?;
            match watch.reading(file, row.bytes_read, total, chunks.counts.rows) {
                ControlFlow::Continue(()) => Ok(ControlFlow::Continue(())),
                ControlFlow::Break(()) => Err(Error::Interrupted),
            }
        })?;
        chunks.encode()?;
        // whoever watches may not come to know otherwise that a file is done
        if watch.reading(file, total, total, chunks.counts.rows).is_break() {
            return Err(Error::Interrupted);
        }
        chunks.writer.finish(&chunks.counts)
    }
}

/// Rows on their way into a store.
struct Chunks<'a> {
    loader: &'a Loader<'a>,
    file: &'a Path,
    writer: StoreWriter,
    counts: Counts,
    rows: Vec<(Place, Value)>,
    bytes: usize,
}

impl Chunks<'_> {
    /// Tokenizes the rows on all threads and writes them, in order.
    fn encode(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        let encode = |(place, value): (Place, Value)| (place, self.loader.encode(value));
        let encoded: Vec<_> = rows.into_par_iter().map(encode).collect();
        for (place, encoded) in encoded {
            let fault = |fault| Error::Row { path: self.file.to_path_buf(), place, fault: Box::new(fault) };
            self.counts.rows += 1;
            match encoded.map_err(fault)? {
                Ok((example, kind)) => {
                    self.writer.push(&example, place)?;
                    self.counts.kept += 1;
                    self.counts.conversations += usize::from(kind == Kind::Conversation);
                    self.counts.alpaca += usize::from(kind == Kind::Alpaca);
                }
                Err(reason) => name(&mut self.counts.named, place, reason),
            }
        }
        Ok(())
    }
}

impl Loader<'_> {
    /// The row as an example, or why nothing of it can be trained.
    fn encode(&self, value: Value) -> Result<Result<(Example, Kind), DropReason>, RowFault> {
        let row = Row::parse(self.options.columns.apply(value)?)?;
        let example = self.encoder.encode(&row)?.within(self.options.vocab_size)?;
        if example.input_ids.len() < 2 {
            return Ok(Err(DropReason::TooShort));
        }
        if example.supervised_tokens() == 0 {
            let labelled = matches!(row, Row::Tokens { .. });
            return Ok(Err(if labelled { DropReason::NoLabel } else { DropReason::NoAnswer }));
        }
        let kind = match row {
            Row::Conversation(_) => Kind::Conversation,
            Row::Alpaca(_) => Kind::Alpaca,
            _ => Kind::Other,
        };
        Ok(Ok((example, kind)))
    }
}

/// Which template a row went through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Conversation,
    Alpaca,
    Other,
}

/// The characters of all strings in a value, and something for each number.
fn size_of_value(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(size_of_value).sum(),
        Value::Object(object) => object.values().map(size_of_value).sum(),
        _ => 8,
    }
}
