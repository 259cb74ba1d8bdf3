//! Weights of a model: frozen ones that may stay in the mapped file, trainable ones in an arena.

use std::{fs::File, ops::Range, path::Path, sync::Arc};

use candle_core::{DType, Device, Shape, Tensor};
use half::bf16;
use memmap2::Mmap;
use pmetal_cpu::PackedWeight;

use crate::{
    Error, Param, Result, Value, elementwise,
    kernel::{View, tensor},
    place::gpu_of,
};

/// A file in memory, shared by the weights that lie in it.
#[derive(Clone, Debug)]
pub struct MappedFile(Arc<Mmap>);

impl MappedFile {
    /// Maps a file read-only. Do not change the file while it is mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let map_error = |source| Error::Map { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(map_error)?;
        // SAFETY: the mapping is read-only and private; that nobody truncates the file meanwhile is what every
        // program that maps model files relies on, and is said in the doc comment.
        let map = unsafe { Mmap::map(&file) }.map_err(map_error)?;
        Ok(Self(Arc::new(map)))
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Lets go of the pages of `range`, which has been copied and will hardly be read again: a hint that loading a model is not
    /// the model twice in memory.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if self.0.get(range.clone()).is_some_and(|bytes| !bytes.is_empty()) {
            // SAFETY: the mapping is read-only and backed by its file: a page that went is read again when it is needed.
            // A system that refuses the hint changes nothing.
            let _ =
                unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// A frozen weight inside a mapped file: row-major little-endian elements.
#[derive(Clone, Debug)]
pub struct MappedWeight {
    file: MappedFile,
    range: Range<usize>,
    dtype: DType,
    shape: Shape,
}

impl MappedWeight {
    /// The weight at `range` of `file`; `None` where the range is outside, has the wrong length, or is not aligned for `dtype`.
    pub fn new(file: &MappedFile, range: Range<usize>, dtype: DType, shape: Shape) -> Option<Self> {
        let bytes = file.bytes().get(range.clone())?;
        let whole = bytes.len() == shape.elem_count() * dtype.size_in_bytes();
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(dtype.size_in_bytes());
        (whole && aligned).then(|| Self { file: file.clone(), range, dtype, shape })
    }

    fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }
}

/// A weight of the model: `[out, in]` for linear layers, `[vocab, hidden]` for embeddings, `[n]` for norms and biases.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Frozen, in memory or on a device.
    Frozen(Tensor),
    /// Frozen, read where it lies in its file.
    Mapped(MappedWeight),
    /// Frozen, in the layout of the CPU's kernels. As a tensor it is bf16.
    Packed(Arc<PackedWeight>, Shape),
    /// Trained in full.
    Trainable(Param),
}

impl Weight {
    /// Its shape.
    pub fn shape(&self) -> &Shape {
        match self {
            Self::Frozen(t) => t.shape(),
            Self::Mapped(m) => &m.shape,
            Self::Packed(_, shape) => shape,
            Self::Trainable(p) => p.value().shape(),
        }
    }

    /// Its dtype.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Frozen(t) => t.dtype(),
            Self::Mapped(m) => m.dtype,
            Self::Packed(..) => DType::BF16,
            Self::Trainable(p) => p.value().dtype(),
        }
    }

    /// The parameter, where it is trained.
    pub fn param(&self) -> Option<&Param> {
        match self {
            Self::Trainable(p) => Some(p),
            _ => None,
        }
    }

    /// The weight in the layout in which the CPU's products read it, where it is a frozen matrix of bf16 on the CPU; else as it is. The plain
    /// copy goes, and the pages of a mapped file.
    pub fn packed(self) -> Result<Self> {
        let (&[out, width], DType::BF16) = (self.shape().dims(), self.dtype()) else { return Ok(self) };
        let on_cpu = match &self {
            Self::Frozen(t) => t.device().is_cpu() && t.is_contiguous(),
            Self::Mapped(_) => true,
            _ => false,
        };
        if !on_cpu || gpu_of(&Device::Cpu)?.is_some() {
            return Ok(self);
        }
        let packed = PackedWeight::new(self.view()?.slice::<bf16>()?, out, width);
        if let Self::Mapped(m) = &self {
            m.file.release(m.range.clone());
        }
        Ok(Self::Packed(Arc::new(packed), self.shape().clone()))
    }

    /// As a contiguous tensor; a mapped or packed weight is copied, and one that is part of a wider matrix.
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Frozen(t) => Ok(t.contiguous()?),
            Self::Mapped(m) => Ok(Tensor::from_raw_buffer(m.bytes(), m.dtype, m.shape.dims(), &Device::Cpu)?),
            Self::Packed(weight, shape) => tensor(weight.unpack(), shape.clone()),
            Self::Trainable(p) => Ok(p.value().clone()),
        }
    }

    /// As a tensor of `dtype`, for kernels that take one dtype; where the weight has it, and is not mapped, nothing is copied.
    pub(crate) fn tensor_in(&self, dtype: DType) -> Result<Tensor> {
        elementwise::converted(&self.tensor()?, dtype)
    }

    /// As a value of the graph; a mapped or packed weight is copied.
    pub fn value(&self) -> Result<Value> {
        match self {
            Self::Trainable(p) => Ok(Value::param(p)),
            _ => Ok(Value::constant(self.tensor()?)),
        }
    }

    /// As a slice for a CPU kernel.
    pub(crate) fn view(&self) -> Result<View<'_>> {
        match self {
            Self::Frozen(t) => View::of_tensor(t, "weight"),
            Self::Mapped(m) => Ok(View::Mapped { bytes: m.bytes(), dtype: m.dtype }),
            Self::Packed(weight, _) => Ok(View::Packed(weight)),
            Self::Trainable(p) => p.view(),
        }
    }

    /// Bytes it holds in memory or keeps mapped.
    pub fn size_in_bytes(&self) -> usize {
        if let Self::Packed(weight, _) = self {
            return weight.size_in_bytes();
        }
        self.shape().elem_count() * self.dtype().size_in_bytes()
    }
}
