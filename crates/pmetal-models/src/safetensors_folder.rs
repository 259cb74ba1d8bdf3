//! The tensors of a Hugging Face folder: one safetensors file, or shards and their index.
//!
//! Only headers are read when a folder is opened, and everything in them is checked against the file before a tensor is looked at.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Shape, Tensor};
use pmetal_ops::{MappedFile, MappedWeight, Weight};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::Value;

use crate::{
    Error, Result,
    dequantize::{self, Packing, transpose},
    names::{EMBEDDING, HEAD, LAYERS},
};

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
    /// How its bytes become numbers, where they are quantized.
    pub(crate) packing: Option<Packing>,
    file: MappedFile,
    range: Range<usize>,
}

impl SafetensorsFolder {
    /// Reads the headers of a folder's files. `None` where it has neither `model.safetensors` nor the index of its shards. What `config`
    /// says about quantization is how quantized tensors are read.
    pub(crate) fn open(folder: &Path, config: &Value) -> Result<Option<Self>> {
        let mut found = Self { tensors: HashMap::new() };
        let (one_file, index) = (folder.join(ONE_FILE), folder.join(INDEX));
        if one_file.is_file() {
            found.add_file(&one_file)?;
        } else if index.is_file() {
            found.add_shards(folder, &index)?;
        } else {
            return Ok(None);
        }
        dequantize::join(&mut found.tensors, config)?;
        Ok(Some(found))
    }

    /// The tensors and their names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    /// Keeps the tensors of a model's text part, under the names that a model of text alone has; returns how many others there were.
    pub(crate) fn keep_text_part(&mut self) -> usize {
        let all = std::mem::take(&mut self.tensors);
        let found = all.len();
        self.tensors = all.into_iter().filter_map(|(name, entry)| Some((text_name(&name)?, entry))).collect();
        found - self.tensors.len()
    }

    fn add_shards(&mut self, folder: &Path, index: &Path) -> Result<()> {
        let text = fs::read(index).map_err(pmetal_core::Error::io("read", index))?;
        let json: Value = serde_json::from_slice(&text)
            .map_err(|e| Error::broken(index, format!("is no JSON: {e}; fetch it again")))?;
        let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(Error::broken(
                index,
                "weight_map: expected an object of tensor names and their files; fetch it again",
            ));
        };
        let mut shards = BTreeSet::new();
        for (tensor, shard) in map {
            // a file name alone: an index does not reach out of its folder
            let shard = shard.as_str().filter(|s| Path::new(s).file_name().is_some_and(|name| name == *s));
            let Some(shard) = shard else {
                return Err(Error::broken(
                    index,
                    format!("weight_map: {tensor} has no file name in this folder; fetch it again"),
                ));
            };
            shards.insert(shard);
        }
        for shard in shards {
            let path = folder.join(shard);
            if !path.is_file() {
                let reason = format!("names the file {shard}, which does not exist; fetch the model again");
                return Err(Error::broken(index, reason));
            }
            self.add_file(&path)?;
        }
        match map.keys().find(|name| !self.tensors.contains_key(*name)) {
            Some(name) => Err(Error::broken(index, format!("weight_map: {name} is not in its file; fetch both again"))),
            None => Ok(()),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = MappedFile::open(path)?;
        let (metadata, data_start) = read_header(path, file.bytes())?;
        let room = (file.bytes().len() - data_start) as u64;
        let mut covered = 0;
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let (start, end) = info.data_offsets;
            covered = covered.max(end as u64);
            if end as u64 > room {
                let (expected, found) = ((end - start) as u64, room.saturating_sub(start as u64));
                return Err(Error::Truncated { path: path.into(), what: format!("tensor {name}"), expected, found });
            }
            let entry = Entry {
                path: path.to_path_buf(),
                shape: Shape::from(info.shape.as_slice()),
                stored: info.dtype,
                packing: None,
                file: file.clone(),
                range: data_start + start..data_start + end,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::broken(path, format!("tensor {name} is in two files; fetch the model again")));
            }
        }
        if covered < room {
            let reason = format!("has {} bytes behind its last tensor; fetch the file again", room - covered);
            return Err(Error::broken(path, reason));
        }
        Ok(())
    }
}

/// What a model of text alone calls a tensor of a model that has a text part; none of the other parts' tensors.
fn text_name(name: &str) -> Option<String> {
    let inner = ["language_model.model.", "model.language_model."].iter().find_map(|prefix| name.strip_prefix(prefix));
    match inner {
        Some(rest) => Some(format!("model.{rest}")),
        None => {
            let name = name.strip_prefix("language_model.").unwrap_or(name);
            let is_text = name == HEAD || name == EMBEDDING || name.starts_with(LAYERS) || name == "model.norm.weight";
            is_text.then(|| name.to_owned())
        }
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
        // not before: a short header's length may begin like a pickle
        if let Some(kind) = pmetal_core::what_it_is(bytes) {
            return Err(Error::broken(path, format!("is no safetensors file but {kind}")));
        }
        let reason = format!("is no safetensors file: a header of {length} bytes; fetch the file again");
        return Err(Error::broken(path, reason));
    }
    let Some(header) = rest.get(..length as usize) else { return Err(truncated(LENGTH_BYTES as u64 + length)) };
    let metadata = serde_json::from_slice(header).map_err(|e| {
        let culprit = wrong_size(header).map(|tensor| format!("tensor {tensor}: ")).unwrap_or_default();
        Error::broken(path, format!("header: {culprit}{e}; fetch the file again"))
    })?;
    Ok((metadata, LENGTH_BYTES + header.len()))
}

/// The first tensor whose bytes are not as many as its shape and dtype need: the library refuses the header without its name.
fn wrong_size(header: &[u8]) -> Option<String> {
    let tensors: BTreeMap<String, Value> = serde_json::from_slice(header).ok()?;
    let fits = |info: &TensorInfo| {
        let count = info.shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
        let bits = count.and_then(|count| count.checked_mul(info.dtype.bitsize()));
        let bytes = info.data_offsets.1.checked_sub(info.data_offsets.0);
        bits.zip(bytes.and_then(|bytes| bytes.checked_mul(8))).is_some_and(|(needed, found)| needed == found)
    };
    let infos = tensors.into_iter().filter_map(|(name, info)| Some((name, serde_json::from_value(info).ok()?)));
    infos.into_iter().find(|(_, info)| !fits(info)).map(|(name, _)| name)
}

impl Entry {
    /// Its dtype, where it is one that a decoder reads; a quantized one is read as bf16.
    pub(crate) fn dtype(&self) -> Option<DType> {
        match self.stored {
            _ if self.packing.is_some() => Some(DType::BF16),
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

    /// The weight in place, or copied where the file does not start it on a border of its elements, or decoded where it is quantized: into bf16, or into f32 where
    /// that is `dtype`.
    pub(crate) fn weight(&self, name: &str, dtype: DType) -> Result<Weight> {
        match &self.packing {
            Some(packing) => Ok(Weight::Frozen(packing.tensor(self, dtype)?)),
            None => self.part(name, self.range.clone(), self.shape.clone()),
        }
    }

    /// Part `index` of `[n, ..]`: in place, as [`Entry::weight`].
    pub(crate) fn slice(&self, name: &str, index: usize, dtype: DType) -> Result<Weight> {
        let (range, shape) = self.place(name, index)?;
        match &self.packing {
            Some(packing) => Ok(Weight::Frozen(packing.matrix(self, index, false, dtype)?)),
            None => self.part(name, range, shape),
        }
    }

    /// The transpose of matrix `index` of `[n, d1, d2]`, `[d2, d1]`.
    pub(crate) fn slice_transposed(&self, name: &str, index: usize, dtype: DType) -> Result<Tensor> {
        let (range, shape) = self.place(name, index)?;
        let (rows, width) = shape.dims2()?;
        if let Some(packing) = &self.packing {
            return packing.matrix(self, index, true, dtype);
        }
        let bytes = self.file.bytes().get(range).unwrap_or_default();
        let dtype = self.known_dtype(name)?;
        let turned = match dtype {
            DType::F32 => transpose(bytes.as_chunks::<4>().0, width).into_flattened(),
            _ => transpose(bytes.as_chunks::<2>().0, width).into_flattened(),
        };
        Ok(Tensor::from_raw_buffer(&turned, dtype, &[width, rows], &Device::Cpu)?)
    }

    /// Where part `index` of `[n, ..]` lies, and its shape.
    fn place(&self, name: &str, index: usize) -> Result<(Range<usize>, Shape)> {
        let Some((&n, rest)) = self.shape.dims().split_first().filter(|(n, rest)| index < **n && !rest.is_empty())
        else {
            let reason = format!("tensor {name} is {:?}, which has no part {index}", self.shape.dims());
            return Err(Error::broken(&self.path, reason));
        };
        let bytes = self.range.len() / n;
        let start = self.range.start + index * bytes;
        Ok((start..start + bytes, Shape::from(rest)))
    }

    /// The elements in `range` in place, or copied where they do not start on a border of an element.
    fn part(&self, name: &str, range: Range<usize>, shape: Shape) -> Result<Weight> {
        let dtype = self.known_dtype(name)?;
        if let Some(mapped) = MappedWeight::new(&self.file, range.clone(), dtype, shape.clone()) {
            return Ok(Weight::Mapped(mapped));
        }
        let bytes = self.file.bytes().get(range).unwrap_or_default();
        Ok(Weight::Frozen(Tensor::from_raw_buffer(bytes, dtype, shape.dims(), &Device::Cpu)?))
    }

    fn known_dtype(&self, name: &str) -> Result<DType> {
        self.dtype().ok_or_else(|| {
            let without = if self.stored == Dtype::F8_E4M3 { " without its scales" } else { "" };
            let (path, tensor, found) = (self.path.clone(), name.to_owned(), format!("{:?}{without}", self.stored));
            Error::TensorDType { path, tensor, found }
        })
    }

    /// Lets go of the pages.
    pub(crate) fn release(&self) {
        self.file.release(self.range.clone());
        if let Some(packing) = &self.packing {
            packing.release();
        }
    }
}
