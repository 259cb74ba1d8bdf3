//! The tensors of a model on disk.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use candle_core::{DType, Tensor};
use pmetal_gguf::GgufFile;
use pmetal_ops::Weight;

use crate::{
    DecoderSpec, Error, Result,
    safetensors_folder::{Entry, SafetensorsFolder},
    stored::{Piece, Stored, in_halves, stored},
};

/// The files' tensors.
pub(super) enum Weights {
    Folder(SafetensorsFolder),
    Gguf {
        file: Box<GgufFile>,
        path: PathBuf,
        /// Of all its tensors.
        names: HashSet<String>,
    },
}

/// A tensor's place, as strictness needs it.
pub(super) struct Found<'a> {
    pub(super) path: &'a Path,
    pub(super) dims: &'a [usize],
}

impl Weights {
    /// Every tensor of the files.
    pub(super) fn found(&self) -> Result<Vec<(String, Found<'_>)>> {
        Ok(match self {
            Self::Folder(folder) => folder
                .iter()
                .map(|(name, entry)| (name.to_owned(), Found { path: &entry.path, dims: entry.shape.dims() }))
                .collect(),
            Self::Gguf { file, path, .. } => {
                file.hf_tensors()?.into_iter().map(|(name, dims)| (name, Found { path, dims })).collect()
            }
        })
    }

    /// The way in which these files hold the decoder's tensor `name`; none where they do not.
    pub(super) fn way(&self, spec: &DecoderSpec, name: &str) -> Option<Stored> {
        stored(spec, name).into_iter().find(|stored| stored.pieces.iter().all(|piece| self.has(&piece.name)))
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.get(name).is_some(),
            Self::Gguf { names, .. } => names.contains(name),
        }
    }

    /// A tensor where it lies, or put together; what is quantized is decoded into `dtype`.
    pub(super) fn read(&self, stored: &Stored, dtype: DType) -> Result<Weight> {
        if let ([piece], false) = (stored.pieces.as_slice(), stored.interleaved) {
            return self.piece(piece, dtype);
        }
        let pieces = stored.pieces.iter().map(|piece| Ok(self.piece(piece, dtype)?.tensor()?));
        let rows = Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 0)?;
        Ok(Weight::Frozen(if stored.interleaved { in_halves(&rows)? } else { rows }))
    }

    fn piece(&self, piece: &Piece, dtype: DType) -> Result<Weight> {
        let Piece { name, expert, transposed } = piece;
        match self {
            Self::Folder(folder) => {
                let missing = || Error::Input { reason: format!("there is no tensor {name}") };
                let entry = folder.get(name).ok_or_else(missing)?;
                match (expert, transposed) {
                    (None, false) => entry.weight(name, dtype),
                    (None, true) => Ok(Weight::Frozen(entry.weight(name, dtype)?.tensor()?.t()?.contiguous()?)),
                    (Some((index, _)), false) => entry.slice(name, *index, dtype),
                    (Some((index, _)), true) => Ok(Weight::Frozen(entry.slice_transposed(name, *index, dtype)?)),
                }
            }
            Self::Gguf { file, .. } => Ok(Weight::Frozen(match expert {
                None => file.hf_tensor(name, dtype)?,
                Some((index, _)) => file.hf_slice(name, *index, dtype)?,
            })),
        }
    }

    /// Lets go of a tensor's pages in the file. A GGUF file lets go by itself when it decodes; a tensor of several experts is let go of with the last.
    pub(super) fn release(&self, stored: &Stored) {
        let Self::Folder(folder) = self else { return };
        let is_last = |piece: &&Piece| piece.expert.is_none_or(|(index, experts)| index + 1 == experts);
        stored.pieces.iter().filter(is_last).filter_map(|piece| folder.get(&piece.name)).for_each(Entry::release);
    }
}
