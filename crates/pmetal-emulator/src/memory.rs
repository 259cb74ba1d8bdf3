//! A call's tensors as copies that a kernel works on, and back.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, backend::BackendStorage};
use pmetal_metal::{Access, Call, Error, Result, pitch};

/// A copy of a tensor's elements, and of what lies between its rows where they have a pitch.
pub(crate) struct TensorCopy {
    /// In words, so that any element is aligned.
    words: Vec<u64>,
    bytes: usize,
    /// Elements from the first to the last.
    pub(crate) len: usize,
    /// Elements from the last multiple of 16 bytes of 16-bit elements to the tensor's first, where it lies.
    pub(crate) misalignment: usize,
    /// Elements of a row that belong to the tensor, and from one row to the next.
    pub(crate) width: usize,
    pub(crate) pitch: usize,
    /// Where the tensor lies, in bytes.
    place: Rows,
}

impl TensorCopy {
    fn of(tensor: &Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(cpu) = &*storage else { return Err(crate::refused("its tensors are on the CPU")) };
        let (start, n) = (layout.start_offset(), layout.shape().elem_count());
        let (width, pitch) = match (tensor.is_contiguous(), tensor.dims(), pitch(tensor)) {
            (true, ..) => (n.max(1), n.max(1)),
            (false, &[_, width], Some(pitch)) => (width, pitch),
            _ => return Err(crate::refused("its tensors are contiguous or rows with a pitch")),
        };
        let len = if n == 0 { 0 } else { (n / width - 1) * pitch + width };
        let size = tensor.dtype().size_in_bytes();
        let all = bytes_of(cpu).ok_or_else(|| crate::refused(format!("tensors of {:?}", cpu.dtype())))?;
        let source = &all[start * size..(start + len) * size];
        let mut words = vec![0u64; source.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..source.len()].copy_from_slice(source);
        let first = source.as_ptr() as usize;
        let place = Rows { bytes: first..first + source.len(), width: width * size, pitch: pitch * size };
        Ok(Self { words, bytes: source.len(), len, misalignment: start % 8, width, pitch, place })
    }

    /// The first element, for the kernel.
    pub(crate) fn data(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

/// Memory of rows of `width` bytes, `pitch` from one to the next.
struct Rows {
    /// From the first row's beginning to the last one's end.
    bytes: Range<usize>,
    width: usize,
    pitch: usize,
}

impl Rows {
    fn overlap(&self, other: &Self) -> bool {
        if self.bytes.start >= other.bytes.end || other.bytes.start >= self.bytes.end {
            return false;
        }
        // column ranges of one matrix lie beside each other
        let shift = (other.bytes.start as isize - self.bytes.start as isize).rem_euclid(self.pitch as isize) as usize;
        self.pitch != other.pitch || shift < self.width || shift + other.width > self.pitch
    }
}

/// The copies of all tensors of a call.
pub(crate) struct Copies(pub(crate) Vec<TensorCopy>);

impl Copies {
    /// Copies what is read; what is only written starts as ones in every bit, NaN as a float.
    pub(crate) fn of(call: &Call) -> Result<Self> {
        let mut copies = call.buffers.iter().map(|tensor| TensorCopy::of(tensor)).collect::<Result<Vec<_>>>()?;
        let buffers = call.kernel.buffers;
        for (i, buffer) in buffers.iter().enumerate().filter(|(_, buffer)| buffer.access != Access::Read) {
            let place = &copies[i].place;
            let shared = (0..copies.len()).find(|&j| j != i && place.overlap(&copies[j].place));
            if let Some(j) = shared {
                return Err(Error::Buffer {
                    kernel: call.kernel.name,
                    buffer: buffer.name,
                    expected: "memory of its own, as it is written".into(),
                    got: format!("shared with {}", buffers[j].name),
                });
            }
            if buffer.access == Access::Write {
                copies[i].words.fill(u64::MAX);
            }
        }
        Ok(Self(copies))
    }

    /// Brings what the kernel wrote back into the tensors.
    pub(crate) fn write_back(&self, call: &Call) -> Result<()> {
        for ((buffer, tensor), copy) in call.kernel.buffers.iter().zip(call.buffers).zip(&self.0) {
            if buffer.access != Access::Read {
                tensor.inplace_op1(&Fill(copy))?;
            }
        }
        Ok(())
    }
}

struct Fill<'a>(&'a TensorCopy);

impl InplaceOp1 for Fill<'_> {
    fn name(&self) -> &'static str {
        "emulator"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (source, Rows { width, pitch, .. }) = (self.0.bytes(), &self.0.place);
        let start = layout.start_offset() * storage.dtype().size_in_bytes();
        let Some(all) = bytes_of_mut(storage) else {
            candle_core::bail!("emulator: a tensor of a dtype that kernels do not know")
        };
        for (to, from) in all[start..start + source.len()].chunks_mut(*pitch).zip(source.chunks(*pitch)) {
            to[..*width].copy_from_slice(&from[..*width]);
        }
        Ok(())
    }
}

fn bytes_of(storage: &CpuStorage) -> Option<&[u8]> {
    match storage {
        CpuStorage::F32(data) => Some(bytemuck::cast_slice(data)),
        CpuStorage::F16(data) => Some(bytemuck::cast_slice(data)),
        CpuStorage::BF16(data) => Some(bytemuck::cast_slice(data)),
        CpuStorage::U32(data) => Some(bytemuck::cast_slice(data)),
        CpuStorage::U8(data) => Some(data),
        _ => None,
    }
}

fn bytes_of_mut(storage: &mut CpuStorage) -> Option<&mut [u8]> {
    match storage {
        CpuStorage::F32(data) => Some(bytemuck::cast_slice_mut(data)),
        CpuStorage::F16(data) => Some(bytemuck::cast_slice_mut(data)),
        CpuStorage::BF16(data) => Some(bytemuck::cast_slice_mut(data)),
        CpuStorage::U32(data) => Some(bytemuck::cast_slice_mut(data)),
        CpuStorage::U8(data) => Some(data),
        _ => None,
    }
}
