//! The tensors of a Hugging Face folder: one safetensors file, or shards and their index.
//!
//! Only headers are read when a folder is opened, and everything in them is checked against the file before a tensor is looked at.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Shape, Tensor};
use pmetal_ops::{MappedFile, MappedWeight, Weight};
use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

use crate::{Error, Result};

const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of the field that holds the header's length.
const LENGTH_BYTES: usize = 8;
/// The longest header the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of a folder, by name.
pub(crate) struct SafetensorsFolder {
    tensors: HashMap<String, Entry>,
}

/// A tensor where it lies.
pub(crate) struct Entry {
    /// Its file.
    pub(crate) path: PathBuf,
    /// Its shape.
    pub(crate) shape: Shape,
    /// Its dtype, as the file names it.
    pub(crate) stored: Dtype,
    file: MappedFile,
    range: Range<usize>,
}

impl SafetensorsFolder {
    /// Reads the headers of a folder's files. `None` where it has neither `model.safetensors` nor the index of its shards.
    pub(crate) fn open(folder: &Path) -> Result<Option<Self>> {
        let mut found = Self { tensors: HashMap::new() };
        let (one_file, index) = (folder.join(ONE_FILE), folder.join(INDEX));
        if one_file.exists() {
            found.add_file(&one_file)?;
        } else if index.exists() {
            found.add_shards(folder, &index)?;
        } else {
            return Ok(None);
        }
        Ok(Some(found))
    }

    /// The tensors and their names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    fn add_shards(&mut self, folder: &Path, index: &Path) -> Result<()> {
        let text = fs::read(index).map_err(pmetal_core::Error::io("read", index))?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| Error::broken(index, e))?;
        let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(Error::broken(index, "weight_map: expected an object of tensor names and their files"));
        };
        let mut shards = BTreeSet::new();
        for (tensor, shard) in map {
            // a file name alone: an index does not reach out of its folder
            let shard = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|name| name == *s));
            let Some(shard) = shard else {
                return Err(Error::broken(index, format!("weight_map: {tensor} has no file name in this folder")));
            };
            shards.insert(shard);
        }
        for shard in shards {
            let path = folder.join(shard);
            if !path.exists() {
                return Err(Error::NotFound { path });
            }
            self.add_file(&path)?;
        }
        match map.keys().find(|name| !self.tensors.contains_key(*name)) {
            Some(name) => Err(Error::broken(index, format!("weight_map: {name} is not in its file"))),
            None => Ok(()),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = MappedFile::open(path)?;
        let (metadata, data_start) = read_header(path, file.bytes())?;
        let room = (file.bytes().len() - data_start) as u64;
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let (start, end) = info.data_offsets;
            if end as u64 > room {
                let (expected, found) = ((end - start) as u64, room.saturating_sub(start as u64));
                return Err(Error::Truncated { path: path.into(), what: format!("tensor {name}"), expected, found });
            }
            let entry = Entry {
                path: path.to_path_buf(),
                shape: Shape::from(info.shape.as_slice()),
                stored: info.dtype,
                file: file.clone(),
                range: data_start + start..data_start + end,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::broken(path, format!("tensor {name} is in two files")));
            }
        }
        Ok(())
    }
}

/// The header of a file and where its data starts.
fn read_header(path: &Path, bytes: &[u8]) -> Result<(Metadata, usize)> {
    let truncated = |expected: u64| Error::Truncated {
        path: path.to_path_buf(),
        what: "the header".into(),
        expected,
        found: bytes.len() as u64,
    };
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated(LENGTH_BYTES as u64));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(Error::broken(path, format!("is no safetensors file: a header of {length} bytes")));
    }
    let Some(header) = rest.get(..length as usize) else { return Err(truncated(LENGTH_BYTES as u64 + length)) };
    let metadata = serde_json::from_slice(header).map_err(|e| Error::broken(path, format!("header: {e}")))?;
    Ok((metadata, LENGTH_BYTES + header.len()))
}

impl Entry {
    /// Its dtype, where it is one that a decoder reads.
    pub(crate) fn dtype(&self) -> Option<DType> {
        match self.stored {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// Its bytes, row-major and little-endian.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.file.bytes().get(self.range.clone()).unwrap_or_default()
    }

    /// The weight in place, or copied where the file does not start it on a border of its elements.
    pub(crate) fn weight(&self, name: &str) -> Result<Weight> {
        let Some(dtype) = self.dtype() else {
            let (path, tensor, found) = (self.path.clone(), name.to_owned(), format!("{:?}", self.stored));
            return Err(Error::TensorDType { path, tensor, found });
        };
        Ok(match MappedWeight::new(&self.file, self.range.clone(), dtype, self.shape.clone()) {
            Some(mapped) => Weight::Mapped(mapped),
            None => Weight::Frozen(Tensor::from_raw_buffer(self.bytes(), dtype, self.shape.dims(), &Device::Cpu)?),
        })
    }

    /// Lets go of the pages.
    pub(crate) fn release(&self) {
        self.file.release(self.range.clone());
    }
}
