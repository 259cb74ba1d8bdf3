//! A call's tensors as copies that a kernel works on, and back.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, backend::BackendStorage};
use pmetal_metal::{Access, Call, Error, Result};

/// A copy of a tensor's elements.
pub(crate) struct TensorCopy {
    /// In words, so that any element is aligned.
    words: Vec<u64>,
    bytes: usize,
    /// Elements.
    pub(crate) len: usize,
    /// Elements from the last multiple of four elements to the tensor's first, where it lies.
    pub(crate) misalignment: usize,
    /// Where the tensor lies.
    place: Range<usize>,
}

impl TensorCopy {
    fn of(tensor: &Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(cpu), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(crate::refused("its tensors are contiguous and on the CPU"));
        };
        let size = tensor.dtype().size_in_bytes();
        let all = bytes_of(cpu).ok_or_else(|| crate::refused(format!("tensors of {:?}", cpu.dtype())))?;
        let source = &all[start * size..end * size];
        let mut words = vec![0u64; source.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..source.len()].copy_from_slice(source);
        let first = source.as_ptr() as usize;
        let place = first..first + source.len();
        Ok(Self { words, bytes: source.len(), len: end - start, misalignment: start % 4, place })
    }

    /// The first element, for the kernel.
    pub(crate) fn data(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
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
            let shared = (0..copies.len()).find(|&j| j != i && overlap(place, &copies[j].place));
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
                tensor.inplace_op1(&Fill(copy.bytes()))?;
            }
        }
        Ok(())
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

struct Fill<'a>(&'a [u8]);

impl InplaceOp1 for Fill<'_> {
    fn name(&self) -> &'static str {
        "emulator"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let start = layout.start_offset() * storage.dtype().size_in_bytes();
        match bytes_of_mut(storage) {
            Some(all) => all[start..start + self.0.len()].copy_from_slice(self.0),
            None => candle_core::bail!("emulator: a tensor of a dtype that kernels do not know"),
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
