//! Rows into a file: JSON lines, a JSON array, or a table of text, compressed where its name says so.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use pmetal_core::StagedFile;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    reader::ending,
    row::Format,
};

/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// A file of rows that appears whole, under its name, when it is finished.
pub struct RowsFile {
    staged: StagedFile,
    path: PathBuf,
    out: Body,
}

enum Body {
    Lines(Sink),
    Array { sink: Sink, rows: usize },
    Table { writer: Box<csv::Writer<Sink>>, columns: &'static [&'static str] },
}

enum Sink {
    Plain(BufWriter<File>),
    Gzip(GzEncoder<BufWriter<File>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<File>>),
}

impl RowsFile {
    /// Starts a file; its ending says which kind: `.jsonl`, `.json`, `.csv` or `.tsv`, with `.gz` or `.zst` behind it where it is to be
    /// compressed.
    ///
    /// # Errors
    /// When the ending is another, or the file cannot be written.
    pub fn create(path: &Path, format: Format) -> Result<Self> {
        let kind = ending(path);
        if !["jsonl", "ndjson", "json", "csv", "tsv"].contains(&kind.as_str()) {
            return Err(Error::OutputKind { path: path.to_path_buf() });
        }
        let staged = StagedFile::new(path)?;
        let failed = |source| Error::Write { path: path.to_path_buf(), source };
        let file = File::create(staged.path()).map_err(failed)?;
        let sink = Sink::new(path, BufWriter::with_capacity(1 << 20, file)).map_err(failed)?;
        let table = |sink, delimiter| {
            let writer = csv::WriterBuilder::new().delimiter(delimiter).from_writer(sink);
            Body::Table { writer: Box::new(writer), columns: format.columns() }
        };
        let out = match kind.as_str() {
            "json" => Body::Array { sink, rows: 0 },
            "csv" => table(sink, b','),
            "tsv" => table(sink, b'\t'),
            _ => Body::Lines(sink),
        };
        let mut file = Self { staged, path: path.to_path_buf(), out };
        if let Body::Table { writer, columns } = &mut file.out {
            writer.write_record(*columns).map_err(|e| Error::Write { path: path.to_path_buf(), source: e.into() })?;
        }
        Ok(file)
    }

    /// Appends a row.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, row: &Value) -> Result<()> {
        let path = &self.path;
        let written = match &mut self.out {
            Body::Lines(sink) => writeln!(sink, "{row}"),
            Body::Array { sink, rows } => {
                *rows += 1;
                write!(sink, "{}{row}", if *rows == 1 { "[\n" } else { ",\n" })
            }
            Body::Table { writer, columns } => {
                let cell = |column: &&str| match row.get(*column) {
                    None | Some(Value::Null) => String::new(),
                    Some(Value::String(text)) => text.clone(),
                    Some(other) => other.to_string(),
                };
                writer.write_record(columns.iter().map(cell)).map_err(io::Error::from)
            }
        };
        written.map_err(|source| Error::Write { path: path.clone(), source })
    }

    /// Ends the file and gives it its name.
    ///
    /// # Errors
    /// When what is left of it cannot be written.
    pub fn finish(self) -> Result<()> {
        let ended = match self.out {
            Body::Lines(sink) => sink.finish(),
            Body::Array { mut sink, rows } => {
                let end = if rows == 0 { "[]\n" } else { "\n]\n" };
                sink.write_all(end.as_bytes()).and_then(|()| sink.finish())
            }
            Body::Table { writer, .. } => writer.into_inner().map_err(|e| e.into_error()).and_then(Sink::finish),
        };
        ended.map_err(|source| Error::Write { path: self.path, source })?;
        Ok(self.staged.commit()?)
    }
}

impl Sink {
    fn new(path: &Path, file: BufWriter<File>) -> io::Result<Self> {
        let last = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        Ok(match last.as_str() {
            "gz" => Self::Gzip(GzEncoder::new(file, Compression::default())),
            "zst" => Self::Zstd(zstd::stream::write::Encoder::new(file, ZSTD_LEVEL)?),
            _ => Self::Plain(file),
        })
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Plain(mut file) => file.flush(),
            Self::Gzip(encoder) => encoder.finish()?.flush(),
            Self::Zstd(encoder) => encoder.finish()?.flush(),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}
