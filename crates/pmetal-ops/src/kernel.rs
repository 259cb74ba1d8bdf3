//! From tensors to the slices that CPU kernels take.

use std::cell::RefCell;

use candle_core::{
    CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor, WithDType,
    backend::BackendStorage,
};
use half::{bf16, f16};
pub(crate) use pmetal_cpu::room;
use pmetal_cpu::{Element, Mat, PackedWeight, Right};

use crate::{Error, Result};

/// An element that candle stores and the CPU kernels compute with.
pub(crate) trait CpuElement: Element + WithDType + bytemuck::Pod {
    /// The storage's elements, where they are of this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! cpu_element {
    ($type:ty, $variant:ident) => {
        impl CpuElement for $type {
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}

cpu_element!(f32, F32);
cpu_element!(bf16, BF16);
cpu_element!(f16, F16);

/// Binds `$T` to the element type of a dtype the CPU kernels know, or returns an error that names it.
macro_rules! for_dtype {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => Err($crate::Error::operand($op, "dtype", "f32, bf16 or f16", other)),
        }
    };
}
pub(crate) use for_dtype;

/// A contiguous tensor, a mapped weight or a packed one, held for the duration of a kernel.
pub(crate) enum View<'a> {
    Tensor { storage: StorageRef<'a>, start: usize, len: usize },
    Mapped { bytes: &'a [u8], dtype: DType },
    Packed(&'a PackedWeight),
}

impl<'a> View<'a> {
    /// A contiguous tensor on the CPU.
    pub(crate) fn of_tensor(tensor: &'a Tensor, op: &'static str) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match layout.contiguous_offsets() {
            Some((start, end)) => Ok(Self::Tensor { storage, start, len: end - start }),
            None => Err(Error::operand(op, "layout", "contiguous", layout.stride())),
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Tensor { storage, .. } => storage.dtype(),
            Self::Mapped { dtype, .. } => *dtype,
            Self::Packed(_) => DType::BF16,
        }
    }

    /// A weight `[out, in]` as the right operand of a product: `Wᵀ [in, out]` where `transposed`, else `W`.
    pub(crate) fn right(&self, out: usize, width: usize, transposed: bool) -> Result<Right<'_>> {
        if let Self::Packed(weight) = *self {
            return Ok(if transposed { Right::Transposed(weight) } else { Right::Weight(weight) });
        }
        for_dtype!("linear", self.dtype(), W => {
            let weight = Mat::new(self.slice::<W>()?, out, width);
            Ok(Right::plain(if transposed { weight.t() } else { weight }))
        })
    }

    /// The elements, which must be of type `T`.
    pub(crate) fn slice<T: CpuElement>(&self) -> Result<&[T]> {
        match self {
            Self::Tensor { storage, start, len } => match &**storage {
                Storage::Cpu(cpu) => Ok(&cpu.as_slice::<T>()?[*start..*start + *len]),
                _ => Err(Error::operand("cpu kernel", "device", "cpu", "another device")),
            },
            Self::Mapped { bytes, dtype } => match bytemuck_slice::<T>(bytes) {
                Some(slice) if *dtype == T::DTYPE => Ok(slice),
                _ => Err(Error::operand("cpu kernel", "mapped weight", T::DTYPE, dtype)),
            },
            Self::Packed(_) => Err(Error::operand("cpu kernel", "weight", "row-major", "packed")),
        }
    }
}

fn bytemuck_slice<T: CpuElement>(bytes: &[u8]) -> Option<&[T]> {
    bytemuck::try_cast_slice(bytes).ok()
}

/// A contiguous tensor on the CPU as a slice to change in place. Views of the same storage must not be held meanwhile.
pub(crate) fn with_slice_mut<T: CpuElement, R>(
    tensor: &Tensor,
    op: &'static str,
    f: impl FnOnce(&mut [T]) -> R,
) -> Result<R> {
    let call = Call { op, f: RefCell::new(Some(f)), result: RefCell::new(None), element: std::marker::PhantomData };
    tensor.inplace_op1(&call)?;
    call.result.into_inner().ok_or_else(|| Error::operand(op, "device", "cpu", tensor.device().location()))
}

struct Call<F, R, T> {
    op: &'static str,
    f: RefCell<Option<F>>,
    result: RefCell<Option<R>>,
    element: std::marker::PhantomData<T>,
}

impl<T: CpuElement, R, F: FnOnce(&mut [T]) -> R> InplaceOp1 for Call<F, R, T> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (start, end) = layout
            .contiguous_offsets()
            .ok_or_else(|| candle_core::Error::Msg(format!("{}: not contiguous", self.op)))?;
        let found = storage.dtype();
        let slice = T::slice_mut(storage).ok_or_else(|| {
            candle_core::Error::Msg(format!("{}: dtype is {found:?}, expected {:?}", self.op, T::DTYPE))
        })?;
        if let Some(f) = self.f.take() {
            self.result.replace(Some(f(&mut slice[start..end])));
        }
        Ok(())
    }
}

/// A CPU tensor around freshly computed elements.
pub(crate) fn tensor<T: CpuElement, S: Into<Shape>>(data: Vec<T>, shape: S) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}
