use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;

use crate::block::BlockType;
use crate::cursor::Cursor;
use crate::metadata::{self, Value};
use crate::weights::Weights;
use crate::{Error, Result};

/// llama.cpp's own limit.
const MAX_DIMENSIONS: u32 = 4;
/// Bytes between tensors where `general.alignment` does not say otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// An open GGUF file: memory-mapped, its header read, every extent in it checked against the file's length.
///
/// Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.
/// The file must not change while it is open, as for every mapped file.
#[derive(Debug)]
pub struct GgufFile {
    pub(crate) path: PathBuf,
    pub(crate) metadata: HashMap<String, Value>,
    map: Mmap,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    /// Named when first asked for.
    pub(crate) weights: OnceLock<Weights>,
}

/// The GGUF files of a folder, by name.
///
/// # Errors
/// When the folder cannot be read.
pub fn gguf_files_in(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let paths = std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let mut files: Vec<PathBuf> = paths.filter(is_gguf).collect();
    files.sort();
    Ok(files)
}

/// One tensor's entry in the header.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Its name in the file, as `blk.0.attn_q.weight`.
    pub name: String,
    /// Its shape, outermost dimension first: `[rows, columns]` for a matrix.
    pub shape: Vec<usize>,
    pub(crate) block_type: BlockType,
    pub(crate) data: Range<usize>,
}

impl TensorInfo {
    /// ggml's name of the block format its numbers are stored in, as `Q4_K`.
    pub fn block_type(&self) -> &'static str {
        self.block_type.name
    }
}

impl GgufFile {
    /// Maps a file and reads its header. The tensors' data is not touched.
    ///
    /// # Errors
    /// When the file cannot be read, is not GGUF, is truncated, states something impossible, is one part of several, or
    /// holds a tensor in an unknown block type.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(pmetal_core::Error::io("read", path))?;
        // SAFETY: the map is only read; that the file stays as it is while it is open is this type's documented condition.
        let map = unsafe { Mmap::map(&file) }.map_err(pmetal_core::Error::io("read", path))?;
        let mut cursor = Cursor::new(path, &map);
        let (tensor_count, pair_count) = read_prologue(&mut cursor, path)?;
        let metadata = metadata::read(&mut cursor, pair_count)?;
        let mut tensors = Vec::new();
        for index in 0..tensor_count {
            tensors.push(read_tensor_info(&mut cursor, path, index, tensor_count)?);
        }
        let header_end = cursor.position();
        let mut file = Self {
            path: path.to_path_buf(),
            metadata,
            map,
            tensors: Vec::new(),
            by_name: HashMap::new(),
            weights: OnceLock::new(),
        };
        file.refuse_parts()?;
        file.place(tensors, header_end)?;
        Ok(file)
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name in the file, if there is one.
    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|&index| self.tensors.get(index))
    }

    pub(crate) fn require_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| Error::MissingTensor { path: self.path.clone(), tensor: name.to_string() })
    }

    /// Bytes of the file; all ranges kept in this type were checked when it was opened.
    pub(crate) fn bytes(&self, range: &Range<usize>) -> &[u8] {
        self.map.get(range.clone()).unwrap_or_default()
    }

    /// Tells the system that the pages of a tensor are not needed again soon, so that reading a model's weights one after
    /// the other does not fill memory with the file. A hint: on a platform without it nothing happens.
    pub(crate) fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        // SAFETY: the mapping is read-only and backed by the file: a dropped page is read again at the next access.
        let _ =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        #[cfg(not(unix))]
        let _ = range;
    }

    pub(crate) fn malformed(&self, what: String, expected: impl Into<String>, found: impl ToString) -> Error {
        Error::Malformed { path: self.path.clone(), what, expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn unsupported(&self, what: impl Into<String>) -> Error {
        Error::Unsupported { path: self.path.clone(), what: what.into() }
    }

    pub(crate) fn tensor_error(&self, tensor: &str, source: candle_core::Error) -> Error {
        Error::Tensor { path: self.path.clone(), tensor: tensor.to_string(), source: Box::new(source) }
    }

    fn refuse_parts(&self) -> Result<()> {
        match self.unsigned("split.count")? {
            Some(count) if count > 1 => Err(self.unsupported(format!(
                "one part of a model in {count} files (join them with 'llama-gguf-split --merge')"
            ))),
            _ => Ok(()),
        }
    }

    /// Turns the header's offsets into checked ranges of the file.
    fn place(&mut self, tensors: Vec<TensorInfo>, header_end: usize) -> Result<()> {
        let alignment = self.unsigned("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if alignment == 0 || alignment % 8 != 0 {
            return Err(self.malformed("metadata key 'general.alignment'".into(), "a multiple of 8", alignment));
        }
        let file_length = self.map.len() as u64;
        let data_start = (header_end as u64).checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        for mut tensor in tensors {
            let what = format!("tensor '{}'", tensor.name);
            let (offset, size) = (tensor.data.start as u64, tensor.data.len() as u64);
            if offset % alignment != 0 {
                return Err(self.malformed(what, format!("an offset that is a multiple of {alignment}"), offset));
            }
            let start = data_start.saturating_add(offset);
            let found = file_length.saturating_sub(start);
            if size > found {
                return Err(Error::Truncated { path: self.path.clone(), what, offset: start, expected: size, found });
            }
            tensor.data = start as usize..(start + size) as usize;
            if self.by_name.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                return Err(self.malformed(what, "one of that name", "two"));
            }
            self.tensors.push(tensor);
        }
        Ok(())
    }
}

/// Magic, version, and the numbers of tensors and of metadata pairs.
fn read_prologue(cursor: &mut Cursor, path: &Path) -> Result<(u64, u64)> {
    let found = cursor.magic()?;
    if found != *b"GGUF" {
        return Err(Error::Magic { path: path.to_path_buf(), found });
    }
    let found = cursor.u32("the version")?;
    if !(2..=3).contains(&found) {
        return Err(Error::Version { path: path.to_path_buf(), found });
    }
    Ok((cursor.u64("the number of tensors")?, cursor.u64("the number of metadata pairs")?))
}

/// One entry of the tensor table, its `data` still an offset from the start of the data and a size.
fn read_tensor_info(cursor: &mut Cursor, path: &Path, index: u64, count: u64) -> Result<TensorInfo> {
    let name = cursor.string(&format!("the name of tensor {} of {count}", index + 1))?;
    let what = format!("tensor '{name}'");
    let dimensions = cursor.u32(&what)?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(cursor.malformed(what, format!("1 to {MAX_DIMENSIONS} dimensions"), dimensions));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(cursor.u64(&what)?);
    }
    // The file counts from the innermost dimension.
    shape.reverse();
    let id = cursor.u32(&what)?;
    let offset = cursor.u64(&what)?;
    let block_type = BlockType::from_id(id).ok_or_else(|| Error::BlockType {
        path: path.to_path_buf(),
        tensor: name.clone(),
        id,
        known: BlockType::known(),
    })?;
    let size = block_type.size_in_bytes(&shape).filter(|&size| size > 0);
    let extent = size.and_then(|size| {
        let start = usize::try_from(offset).ok()?;
        Some(start..start.checked_add(size)?)
    });
    let Some(data) = extent else {
        let expected = format!("rows of whole {} blocks of {} numbers", block_type.name, block_type.block_size());
        return Err(cursor.malformed(what, expected, format!("shape {shape:?} at offset {offset}")));
    };
    // A size that fits in memory has dimensions that do.
    let shape = shape.into_iter().map(|dimension| dimension as usize).collect();
    Ok(TensorInfo { name, shape, block_type, data })
}
