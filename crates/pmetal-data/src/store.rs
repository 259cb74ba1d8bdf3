//! Tokenized rows on disk: written once, then read row by row, so that memory does not grow with the dataset.
//!
//! A store is a folder of three files. `tokens` holds u32 values, little-endian: a row's ids, each with its highest bit set where the token
//! is trained; behind the ids of a row whose labels are others than its ids, those labels. `index` has a record of [`RECORD`] bytes for each
//! row. `counts.json` tells what was left out.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::{
    encode::{Example, IGNORE},
    error::{Error, Place, Result},
    report::Counts,
};

const TOKENS: &str = "tokens";
const INDEX: &str = "index";
const COUNTS: &str = "counts.json";
/// Bytes of an index record.
const RECORD: usize = 48;
/// Marks a trained token; ids are below it.
const TRAINED: u32 = 1 << 31;
/// A record's `element` where the row is a line.
const NO_ELEMENT: u32 = u32::MAX;
/// A record's `element` where the row is one of Parquet's.
const ROW: u32 = u32::MAX - 1;
/// Records read at once in a pass over all.
const BATCH: usize = 4096;

/// What the index says of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Place of the row in `tokens`, in values.
    offset: u64,
    /// Tokens.
    pub(crate) tokens: u32,
    /// Trained tokens but for the first.
    pub(crate) supervised: u32,
    /// Where the first of those is.
    pub(crate) first_supervised: u32,
    /// Whether labels follow the ids.
    has_labels: bool,
    /// Where the row stands in its file.
    pub(crate) place: Place,
    /// A hash of ids and labels.
    pub(crate) hash: u64,
}

impl Record {
    fn of(example: &Example, offset: u64, place: Place) -> Self {
        let counted = |&(at, &label): &(usize, &i64)| at > 0 && label != IGNORE;
        let mut supervised = example.labels.iter().enumerate().filter(counted);
        let first_supervised = supervised.next().map_or(u32::MAX, |(at, _)| at as u32);
        Self {
            offset,
            tokens: example.input_ids.len() as u32,
            supervised: if first_supervised == u32::MAX { 0 } else { 1 + supervised.count() as u32 },
            first_supervised,
            has_labels: !labels_are_ids(example),
            place,
            hash: hash(example),
        }
    }

    fn to_bytes(self) -> [u8; RECORD] {
        let (line, element) = match self.place {
            Place::Line(line) => (line, NO_ELEMENT),
            Place::Element { line, element } => (line, (element as u32).min(ROW - 1)),
            Place::Row(row) => (row, ROW),
        };
        let words = [self.offset, line as u64, self.hash];
        let halves = [self.tokens, self.supervised, self.first_supervised, u32::from(self.has_labels), element, 0];
        let mut bytes = [0; RECORD];
        let values = words.into_iter().flat_map(u64::to_le_bytes).chain(halves.into_iter().flat_map(u32::to_le_bytes));
        bytes.iter_mut().zip(values).for_each(|(byte, value)| *byte = value);
        bytes
    }

    fn from_bytes(bytes: &[u8; RECORD]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at * 8 + i]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[24 + at * 4 + i]));
        let line = word(1) as usize;
        let place = match half(4) {
            NO_ELEMENT => Place::Line(line),
            ROW => Place::Row(line),
            element => Place::Element { line, element: element as usize },
        };
        Self {
            offset: word(0),
            tokens: half(0),
            supervised: half(1),
            first_supervised: half(2),
            has_labels: half(3) != 0,
            place,
            hash: word(2),
        }
    }
}

fn labels_are_ids(example: &Example) -> bool {
    example.input_ids.iter().zip(&example.labels).all(|(&id, &label)| label == IGNORE || label == i64::from(id))
}

/// A hash of ids and labels.
pub(crate) fn hash(example: &Example) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for (id, label) in example.input_ids.iter().zip(&example.labels) {
        hasher.update(&id.to_le_bytes());
        hasher.update(&(*label as i32).to_le_bytes());
    }
    let bytes = hasher.finalize();
    u64::from_le_bytes(std::array::from_fn(|i| bytes.as_bytes()[i]))
}

/// Writes a store into a folder.
pub(crate) struct StoreWriter {
    folder: PathBuf,
    tokens: BufWriter<File>,
    index: BufWriter<File>,
    offset: u64,
}

impl StoreWriter {
    /// Starts the files in a folder that is there.
    pub(crate) fn create(folder: &Path) -> Result<Self> {
        let start = |name: &str| {
            let path = folder.join(name);
            let file = File::create(&path).map_err(|source| Error::Write { path, source })?;
            Ok::<_, Error>(BufWriter::with_capacity(1 << 20, file))
        };
        Ok(Self { folder: folder.to_path_buf(), tokens: start(TOKENS)?, index: start(INDEX)?, offset: 0 })
    }

    /// Appends a row.
    pub(crate) fn push(&mut self, example: &Example, place: Place) -> Result<()> {
        let record = Record::of(example, self.offset, place);
        let written = self.write(example, &record);
        written.map_err(|source| Error::Write { path: self.folder.clone(), source })
    }

    fn write(&mut self, example: &Example, record: &Record) -> io::Result<()> {
        let mut put = |value: u32| {
            self.offset += 1;
            self.tokens.write_all(&value.to_le_bytes())
        };
        for (&id, &label) in example.input_ids.iter().zip(&example.labels) {
            put(if label == IGNORE || record.has_labels { id } else { id | TRAINED })?;
        }
        if record.has_labels {
            example.labels.iter().try_for_each(|&label| put(label as i32 as u32))?;
        }
        self.index.write_all(&record.to_bytes())
    }

    /// Ends the files.
    pub(crate) fn finish(mut self, counts: &Counts) -> Result<()> {
        let ended = self.tokens.flush().and_then(|()| self.index.flush()).and_then(|()| {
            let text = serde_json::to_vec(counts).map_err(io::Error::other)?;
            fs::write(self.folder.join(COUNTS), text)
        });
        ended.map_err(|source| Error::Write { path: self.folder.clone(), source })
    }
}

/// An open store.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
    tokens: File,
    index: File,
    len: usize,
    pub(crate) counts: Counts,
}

impl Store {
    /// Opens a store; none where the folder holds no whole one.
    pub(crate) fn open(folder: &Path) -> Option<Self> {
        let counts: Counts = serde_json::from_slice(&fs::read(folder.join(COUNTS)).ok()?).ok()?;
        let open = |name: &str| File::open(folder.join(name)).ok();
        let (tokens, index) = (open(TOKENS)?, open(INDEX)?);
        let len = index.metadata().ok()?.len() as usize / RECORD;
        (len == counts.kept).then(|| Self { folder: folder.to_path_buf(), tokens, index, len, counts })
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// What the index says of a row below [`Store::len`].
    pub(crate) fn record(&self, row: usize) -> Result<Record> {
        let mut bytes = [0; RECORD];
        let read = read_exact_at(&self.index, &mut bytes, (row * RECORD) as u64);
        read.map_err(|source| self.failed(INDEX, source))?;
        Ok(Record::from_bytes(&bytes))
    }

    /// Calls `f` with every record, in order.
    pub(crate) fn for_each_record(&self, mut f: impl FnMut(usize, Record)) -> Result<()> {
        let mut bytes = vec![0; BATCH * RECORD];
        for start in (0..self.len).step_by(BATCH) {
            let part = bytes.get_mut(..(self.len - start).min(BATCH) * RECORD).unwrap_or_default();
            let read = read_exact_at(&self.index, part, (start * RECORD) as u64);
            read.map_err(|source| self.failed(INDEX, source))?;
            for (at, record) in part.as_chunks::<RECORD>().0.iter().enumerate() {
                f(start + at, Record::from_bytes(record));
            }
        }
        Ok(())
    }

    /// The first `limit` tokens of a row.
    pub(crate) fn example(&self, record: &Record, limit: usize) -> Result<Example> {
        let tokens = record.tokens as usize;
        let read = |start: u64, count: usize| -> Result<Vec<u32>> {
            let mut bytes = vec![0; count * 4];
            let read = read_exact_at(&self.tokens, &mut bytes, start * 4);
            read.map_err(|source| self.failed(TOKENS, source))?;
            Ok(bytes.as_chunks::<4>().0.iter().map(|value| u32::from_le_bytes(*value)).collect())
        };
        let values = read(record.offset, tokens.min(limit))?;
        let labels = if record.has_labels {
            let labels = read(record.offset + tokens as u64, tokens.min(limit))?;
            labels.into_iter().map(|label| i64::from(label as i32)).collect()
        } else {
            let label = |&value: &u32| if value & TRAINED == 0 { IGNORE } else { i64::from(value & !TRAINED) };
            values.iter().map(label).collect()
        };
        let input_ids = values.into_iter().map(|value| value & !TRAINED).collect();
        Ok(Example { input_ids, labels })
    }

    fn failed(&self, name: &str, source: io::Error) -> Error {
        Error::Read { path: self.folder.join(name), source }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(not(unix))]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let rows = [
            (Example { input_ids: vec![5, 6, 7], labels: vec![IGNORE, 6, IGNORE] }, Place::Line(3)),
            (Example { input_ids: vec![8, 9], labels: vec![IGNORE, 4] }, Place::Element { line: 7, element: 2 }),
            (Example { input_ids: vec![1, 2, 3, 4], labels: vec![1, 2, 3, 4] }, Place::Row(11)),
        ];
        let mut writer = StoreWriter::create(folder.path()).unwrap();
        for (example, place) in &rows {
            writer.push(example, *place).unwrap();
        }
        assert!(Store::open(folder.path()).is_none(), "it has no counts yet");
        writer.finish(&Counts { rows: 4, kept: 3, ..Counts::default() }).unwrap();

        let store = Store::open(folder.path()).unwrap();
        assert_eq!((store.len(), store.counts.rows), (3, 4));
        let mut records = Vec::new();
        store.for_each_record(|at, record| records.push((at, record))).unwrap();
        for (at, (example, place)) in rows.iter().enumerate() {
            let record = store.record(at).unwrap();
            assert_eq!(records[at], (at, record));
            assert_eq!(record.place, *place);
            assert_eq!(record.supervised as usize, example.supervised_tokens());
            assert_eq!(store.example(&record, usize::MAX).unwrap(), *example);
            let cut = Example { input_ids: example.input_ids[..2].to_vec(), labels: example.labels[..2].to_vec() };
            assert_eq!(store.example(&record, 2).unwrap(), cut);
        }
        assert_eq!([0, 1, 2].map(|at| records[at].1.first_supervised), [1, 1, 1]);
        fs::write(folder.path().join(INDEX), [0; RECORD]).unwrap();
        assert!(Store::open(folder.path()).is_none(), "it was cut");
    }
}
