//! Rows out of a file, one at a time, whatever the file is: JSON lines, a JSON array, a table of text, Parquet, plain text; the texts
//! compressed or not.

mod json;
mod parquet;
mod table;
mod text;

use std::{
    cell::Cell,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    ops::ControlFlow,
    path::{Path, PathBuf},
    rc::Rc,
};

use serde_json::Value;

use crate::error::{Error, Place, Result, RowFault};

/// Endings of files that hold rows, each also followed by `.gz` or `.zst`.
pub(crate) const ENDINGS: [&str; 7] = ["jsonl", "json", "ndjson", "parquet", "csv", "tsv", "txt"];
const COMPRESSED: [&str; 2] = ["gz", "zst"];

/// No row is longer: a file without line ends is no file of rows.
const MAX_ROW_BYTES: u64 = 256 << 20;
const BUFFER: usize = 1 << 20;

/// A row as a file has it.
pub(crate) struct RawRow {
    pub(crate) place: Place,
    pub(crate) value: Value,
    /// Bytes of the file read so far.
    pub(crate) bytes_read: u64,
}

/// What is done with each row: it may stop the reading.
pub(crate) type UseRow<'a> = dyn FnMut(RawRow) -> Result<ControlFlow<()>> + 'a;

/// The ending that tells a file's kind, in lower case and without that of its compression.
pub(crate) fn ending(path: &Path) -> String {
    let lower = |path: &Path| path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let last = lower(path);
    if COMPRESSED.contains(&last.as_str()) {
        path.file_stem().map(|s| lower(Path::new(s))).unwrap_or_default()
    } else {
        last
    }
}

/// Calls `use_row` with each row of a file, in order, until it breaks or fails. No more than one row is held at a time.
///
/// Compression and Parquet are known by their first bytes, tables and plain text by their ending (`.csv`, `.tsv`, `.txt`), and all else is
/// JSON: lines of objects, or an array of them.
///
/// # Errors
/// When the file cannot be read or is no file of rows, when a row is broken, or what `use_row` returns.
pub(crate) fn for_each_row(path: &Path, use_row: &mut UseRow) -> Result<()> {
    if path.is_dir() {
        return Err(not_rows(path, "a folder"));
    }
    let mut opened = Opened::new(path)?;
    let start = opened.start()?;
    if let Some(found) = foreign(&start) {
        return Err(not_rows(path, found));
    }
    if start.starts_with(b"PAR1") {
        return parquet::rows(path, use_row);
    }
    match ending(path).as_str() {
        "csv" => table::rows(&mut opened, None, use_row),
        "tsv" => table::rows(&mut opened, Some(b'\t'), use_row),
        "txt" => text::rows(&mut opened, use_row),
        "parquet" => Err(not_rows(path, "a file without Parquet's first bytes, PAR1")),
        _ => json::rows(&mut opened, use_row),
    }
}

/// What a file is by its first bytes, where rows cannot be read out of it.
fn foreign(start: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 7] = [
        (b"PK\x03\x04", "a zip archive: unpack it first"),
        (b"ARROW1", "an Arrow file: save it as Parquet"),
        (b"\xff\xfe", "text in UTF-16: save it as UTF-8"),
        (b"\xfe\xff", "text in UTF-16: save it as UTF-8"),
        (b"GGUF", "a GGUF model"),
        (b"SQLite format 3", "a database: export a table as CSV"),
        (b"%PDF", "a PDF"),
    ];
    kinds.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, what)| what)
}

fn not_rows(path: &Path, found: &'static str) -> Error {
    Error::NotRows { path: path.to_path_buf(), found }
}

/// A file of text, decompressed, its byte order mark left out, and how far it was read.
struct Opened {
    path: PathBuf,
    reader: Box<dyn BufRead>,
    read: Rc<Cell<u64>>,
}

impl Opened {
    fn new(path: &Path) -> Result<Self> {
        let failed = |source| Error::Read { path: path.to_path_buf(), source };
        let read = Rc::new(Cell::new(0));
        let file = Counted { file: File::open(path).map_err(failed)?, read: Rc::clone(&read) };
        let mut plain = BufReader::with_capacity(BUFFER, file);
        let start = plain.fill_buf().map_err(failed)?;
        let mut reader: Box<dyn BufRead> = if start.starts_with(&[0x1f, 0x8b]) {
            Box::new(BufReader::with_capacity(BUFFER, flate2::bufread::MultiGzDecoder::new(plain)))
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let decoder = zstd::stream::read::Decoder::with_buffer(plain).map_err(failed)?;
            Box::new(BufReader::with_capacity(BUFFER, decoder))
        } else {
            Box::new(plain)
        };
        if reader.fill_buf().map_err(failed)?.starts_with(b"\xef\xbb\xbf") {
            reader.consume(3);
        }
        Ok(Self { path: path.to_path_buf(), reader, read })
    }

    /// The first bytes, as many as are there at once.
    fn start(&mut self) -> Result<Vec<u8>> {
        let path = &self.path;
        let start = self.reader.fill_buf().map_err(|source| Error::Read { path: path.clone(), source })?;
        Ok(start.iter().take(16).copied().collect())
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Read { path: self.path.clone(), source }
    }

    fn fault(&self, place: Place, fault: RowFault) -> Error {
        Error::Row { path: self.path.clone(), place, fault: Box::new(fault) }
    }

    /// The next line with its end, empty at the end of the file.
    fn line<'a>(&mut self, bytes: &'a mut Vec<u8>, line: usize) -> Result<&'a [u8]> {
        bytes.clear();
        let read = (&mut self.reader).take(MAX_ROW_BYTES + 1).read_until(b'\n', bytes);
        if read.map_err(|source| self.failed(source))? as u64 > MAX_ROW_BYTES {
            return Err(self.fault(Place::Line(line), RowFault::TooLong { limit: MAX_ROW_BYTES }));
        }
        Ok(bytes)
    }

    fn row(&self, place: Place, value: Value) -> RawRow {
        RawRow { place, value, bytes_read: self.read.get() }
    }
}

/// Counts the bytes that were read of a file.
struct Counted {
    file: File,
    read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(out)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// The size of a file.
pub(crate) fn size_of(path: &Path) -> Result<u64> {
    let size = fs::metadata(path).map(|metadata| metadata.len());
    size.map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    pub(super) fn read(name: &str, contents: &[u8]) -> Result<Vec<(Place, Value)>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        let mut rows = Vec::new();
        for_each_row(&path, &mut |row| {
            assert!(row.bytes_read <= contents.len() as u64);
            rows.push((row.place, row.value));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(rows)
    }

    pub(super) fn message(name: &str, contents: &[u8]) -> String {
        read(name, contents).unwrap_err().to_string()
    }

    #[test]
    fn compression_is_known_by_the_first_bytes() {
        let rows = b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n";
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(rows).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::stream::encode_all(&rows[..], 1).unwrap();
        let plain = read("x.jsonl", rows).unwrap();
        assert_eq!(read("x.jsonl.gz", &gzip).unwrap(), plain);
        assert_eq!(read("x.jsonl.zst", &zstd).unwrap(), plain);
        // members behind one another, as pigz and log rotation write them
        assert_eq!(read("x", &[gzip.clone(), gzip.clone()].concat()).unwrap().len(), 4);
        let cut = message("x.jsonl.gz", &gzip[..gzip.len() / 2]);
        assert!(cut.starts_with("cannot read") && cut.contains("x.jsonl.gz"), "{cut}");
        let cut = message("x.jsonl.zst", &zstd[..zstd.len() - 3]);
        assert!(cut.starts_with("cannot read") && cut.contains("x.jsonl.zst"), "{cut}");
        assert_eq!(ending(Path::new("a/b.CSV.gz")), "csv");
    }

    #[test]
    fn files_of_other_kinds_are_named() {
        assert!(message("x.jsonl", b"PK\x03\x04").contains("a zip archive: unpack it"));
        assert!(message("x.jsonl", b"\xff\xfe{\0}\0").contains("UTF-16: save it as UTF-8"));
        assert!(message("x.parquet", b"nothing").contains("PAR1"));
        let folder = tempfile::tempdir().unwrap();
        assert!(for_each_row(folder.path(), &mut |_| panic!()).unwrap_err().to_string().contains("a folder"));
    }

    #[test]
    fn reading_stops_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let files = [
            ("x.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n broken"),
            ("x.json", "[{\"text\": \"a\"}, {\"text\": \"b\"}, broken"),
            ("x.csv", "text\na\nb\n\"broken"),
            ("x.txt", "a\nb\n\u{1}"),
        ];
        for (name, contents) in files {
            let path = folder.path().join(name);
            std::fs::write(&path, contents).unwrap();
            let mut texts = Vec::new();
            for_each_row(&path, &mut |row| {
                texts.push(row.value["text"].as_str().unwrap().to_owned());
                Ok(if texts.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })
            .unwrap();
            assert_eq!(texts, ["a", "b"], "{name}");
        }
    }
}
