//! A Metal device's memory: its limit, and buffers of exact size.

use std::sync::{Arc, atomic::Ordering};

use candle_core::{CpuStorage, DType, Device, MetalDevice, MetalStorage, Shape, Storage, Tensor, op::BackpropOp};
use candle_metal_kernels::metal::Buffer;
use objc2_metal::MTLResourceOptions;

use super::{Metal, of};
use crate::{Error, Result, empty};

/// Buffers smaller than this are not counted against the limit one by one.
const SMALL: usize = 1 << 20;

impl Metal {
    /// Bytes in use; moves the peak on.
    pub(super) fn live(&self) -> u64 {
        let live = self.device.current_allocated_size() as u64;
        self.peak.fetch_max(live, Ordering::Relaxed);
        live
    }

    /// Refuses `bytes` that would not fit the working set beside what is live. Metal itself would grant them, and the machine would
    /// spend its time moving memory.
    fn reserve(&self, bytes: usize) -> Result<()> {
        let total = self.device.recommended_max_working_set_size() as u64;
        let fits = |live: u64| total == 0 || live.saturating_add(bytes as u64) <= total;
        if bytes < SMALL || fits(self.live()) {
            return Ok(());
        }
        // frees what candle's pool no longer lends
        self.device.wait_until_completed()?;
        let live = self.live();
        if fits(live) { Ok(()) } else { Err(Error::OutOfMemory { live, asked: bytes as u64 }) }
    }
}

/// Asks for room in the working set for a buffer of `bytes` of candle's pool, which rounds up to a power of two.
pub(crate) fn reserve(device: &MetalDevice, bytes: usize) -> Result<()> {
    if bytes < SMALL { Ok(()) } else { of(device).reserve(bytes.next_power_of_two()) }
}

/// A copy of a tensor of the host on `device`, in a buffer of its own size: for weights.
///
/// # Errors
/// [`Error::OutOfMemory`] when the working set has no room for it; an error of candle for dtypes that no kernel knows.
pub fn exact(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    let (Device::Metal(metal), Device::Cpu) = (device, tensor.device()) else {
        return Ok(tensor.to_device(device)?);
    };
    if tensor.elem_count() == 0 {
        return empty(tensor.shape(), tensor.dtype(), device);
    }
    of(metal).reserve(tensor.elem_count() * tensor.dtype().size_in_bytes())?;
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Ok(tensor.to_device(device)?);
    };
    let (start, end) = (layout.start_offset(), layout.start_offset() + tensor.elem_count());
    // candle keeps such a buffer at its size, and frees it in the first wait after its last use
    let buffer = match storage {
        CpuStorage::F32(data) => metal.new_buffer_with_data(&data[start..end]),
        CpuStorage::F16(data) => metal.new_buffer_with_data(&data[start..end]),
        CpuStorage::BF16(data) => metal.new_buffer_with_data(&data[start..end]),
        CpuStorage::U32(data) => metal.new_buffer_with_data(&data[start..end]),
        CpuStorage::U8(data) => metal.new_buffer_with_data(&data[start..end]),
        _ => return Ok(tensor.to_device(device)?),
    }?;
    Ok(wrap(buffer, metal, tensor.shape(), tensor.dtype()))
}

/// Zeros on `device`, in a buffer of their own size: for arenas.
///
/// # Errors
/// [`Error::OutOfMemory`] when the working set has no room for them.
pub fn exact_zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let Device::Metal(metal) = device else {
        return Ok(Tensor::zeros(shape, dtype, device)?);
    };
    // a blit fills whole words
    let bytes = (shape.elem_count() * dtype.size_in_bytes()).max(1).next_multiple_of(16);
    of(metal).reserve(bytes)?;
    // untracked as candle's own; in no residency set, which would hold it for ever
    let options = MTLResourceOptions(
        MTLResourceOptions::StorageModePrivate.0 | MTLResourceOptions::HazardTrackingModeUntracked.0,
    );
    let buffer = Arc::new(metal.metal_device().new_buffer(bytes, options).map_err(|e| of(metal).failed(e))?);
    metal.blit_command_encoder()?.fill_buffer(&buffer, (0, bytes), 0);
    Ok(wrap(buffer, metal, &shape, dtype))
}

fn wrap(buffer: Arc<Buffer>, metal: &MetalDevice, shape: &Shape, dtype: DType) -> Tensor {
    let storage = MetalStorage::new(buffer, metal.clone(), shape.elem_count(), dtype);
    Tensor::from_storage(Storage::Metal(storage), shape.clone(), BackpropOp::none(), false)
}
