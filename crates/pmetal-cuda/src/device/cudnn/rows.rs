//! Packed rows as cuDNN reads them, made on the device.

use candle_core::{
    DType, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg, sys::CUdeviceptr},
    },
};
use pmetal_metal::{AttentionRows, Error, Result, empty};

use super::{
    super::CudaGpu,
    attention::{Shape, Slot, WIDTHS},
};

/// The kernel that lists them.
pub(super) struct Rows(CudaFunction);

/// Where rows begin and how long they are.
pub(super) struct Offsets {
    /// i32 `[rows]`.
    pub(super) lengths: Tensor,
    /// i64 `[WIDTHS, rows + 1 or more]`, in elements: of each of the widths.
    offsets: Tensor,
    widths: [usize; WIDTHS],
}

/// The kernel's argument of that name.
#[repr(C)]
struct Widths([u32; WIDTHS]);

// SAFETY: as laid out as the kernel's.
unsafe impl DeviceRepr for Widths {}

impl Rows {
    pub(super) fn new(gpu: &CudaGpu) -> Result<Self> {
        let module = gpu.compile("rows.cu", include_str!("rows.cu"), &[&format!("-DWIDTHS={WIDTHS}")])?;
        Ok(Self(module.load_function("packed_rows").w()?))
    }

    /// The rows of `table`, and rows of length 0 behind them up to those of `shape`.
    pub(super) fn offsets(&self, gpu: &CudaGpu, rows: &AttentionRows, shape: Shape) -> Result<Offsets> {
        const THREADS: u32 = 128;
        let device = rows.table.device();
        // each begins at a multiple of 16 bytes
        let stride = (shape.rows + 1).next_multiple_of(2);
        let lengths = empty(shape.rows, DType::I32, device)?;
        let offsets = empty((WIDTHS, stride), DType::I64, device)?;
        let (table, lengths_at, offsets_at) =
            (gpu.address(&rows.table)?, gpu.address(&lengths)?, gpu.address(&offsets)?);
        let too_large = |_| Error::Device { device: gpu.name(), reason: "an attention's shape is too large".into() };
        let number = |n: usize| u32::try_from(n).map_err(too_large);
        let (count, slots, stride) = (number(rows.rows)?, number(shape.rows)?, number(stride)?);
        let mut widths = Widths([0; WIDTHS]);
        for (to, width) in widths.0.iter_mut().zip(shape.widths()) {
            *to = number(width)?;
        }
        let mut launch = gpu.stream.launch_builder(&self.0);
        launch.arg(&table).arg(&lengths_at).arg(&offsets_at).arg(&count).arg(&slots).arg(&stride).arg(&widths);
        let config =
            LaunchConfig { grid_dim: (slots / THREADS + 1, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel's signature, and it writes no more than the tensors hold.
        unsafe { launch.launch(config) }.w()?;
        Ok(Offsets { lengths, offsets, widths: shape.widths() })
    }
}

impl Offsets {
    /// What a plan wants of them.
    pub(super) fn places(&self, gpu: &CudaGpu) -> Result<Vec<(Slot, CUdeviceptr)>> {
        let mut places = vec![(Slot::Lengths, gpu.address(&self.lengths)?)];
        for (index, &width) in self.widths.iter().enumerate() {
            places.push((Slot::Offsets(width), gpu.address(&self.offsets.get(index)?)?));
        }
        Ok(places)
    }
}
