//! Devices as a run asks for them, and their memory.

use candle_core::{DType, Device, Tensor};
use pmetal_core::DeviceChoice;
use pmetal_metal::{Error as GpuError, Facts, Memory};

use crate::{Error, Result, doctor, place::gpu_of};

/// Opens the device that was asked for. `Auto` takes Metal, else the first CUDA device, else the CPU. Operations whose kernels the doctor
/// found wrong on this machine compute by their reference from here on.
///
/// # Errors
/// Where the device that was named is not there, or not in this build.
pub fn open(choice: DeviceChoice) -> Result<Device> {
    let device = open_as_is(choice)?;
    doctor::heed(&device)?;
    Ok(device)
}

/// [`open`], whatever the doctor found.
pub(crate) fn open_as_is(choice: DeviceChoice) -> Result<Device> {
    Ok(match choice {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda(ordinal) => pmetal_cuda::open(ordinal)?,
        DeviceChoice::Metal => pmetal_metal::open()?,
        DeviceChoice::Auto => pmetal_metal::open().or_else(|_| pmetal_cuda::open(0)).unwrap_or(Device::Cpu),
    })
}

/// Whether every run on a GPU is to give the same bits, as it does on the CPU; to be said before the first operation. It costs the choice
/// of the fastest way of a product, and of attention whose backward adds up in whatever order comes.
pub fn deterministic(on: bool) {
    pmetal_cuda::deterministic(on);
}

/// The name of a device in reports: cpu, cuda:0, metal.
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { .. } => "metal".into(),
    }
}

/// The dtype that adapters and trained weights are computed with: the CPU multiplies f32 with anything, a GPU's products take one dtype.
pub fn trained_dtype(device: &Device, model: DType) -> DType {
    if device.is_cpu() { DType::F32 } else { model }
}

/// A tensor of the host on the device, in a buffer of its exact size: for weights, which stay.
pub fn send(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    match device {
        Device::Metal(_) => Ok(pmetal_metal::exact(tensor, device)?),
        _ => Ok(tensor.to_device(device)?),
    }
}

/// The memory of a GPU as its allocator counts it; none for the CPU.
pub fn memory(device: &Device) -> Result<Option<Memory>> {
    Ok(gpu_of(device)?.map(|gpu| gpu.memory()).transpose()?)
}

/// Most bytes that tensors on the device took, since the start or since [`reset_peak`].
pub fn peak_bytes(device: &Device) -> Result<u64> {
    Ok(memory(device)?.map_or(pmetal_cpu::peak_bytes() as u64, |memory| memory.peak))
}

/// Starts the peak anew.
pub fn reset_peak(device: &Device) -> Result<()> {
    match gpu_of(device)? {
        Some(gpu) => gpu.reset_peak()?,
        None => pmetal_cpu::reset_peak(),
    }
    Ok(())
}

/// Waits until the device has done all that was asked for.
pub fn synchronize(device: &Device) -> Result<()> {
    Ok(gpu_of(device)?.map_or(Ok(()), |gpu| gpu.synchronize())?)
}

/// What a GPU is; none for the CPU.
pub fn facts(device: &Device) -> Result<Option<Facts>> {
    Ok(gpu_of(device)?.map(|gpu| gpu.facts()))
}

/// Whether the tensor library failed because a GPU's memory was full.
pub fn is_out_of_memory(error: &candle_core::Error) -> bool {
    pmetal_cuda::is_out_of_memory(error)
}

impl Error {
    /// Whether the device's memory was full.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Gpu(GpuError::OutOfMemory { .. }) => true,
            Self::Gpu(GpuError::Candle(error)) | Self::Candle(error) => is_out_of_memory(error),
            _ => false,
        }
    }
}
