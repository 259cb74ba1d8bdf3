//! Packed rows as cuDNN reads them, made on the device.

use candle_core::{
    DType, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg, sys::CUdeviceptr},
    },
};
use pmetal_metal::{AttentionRows, Error, Result, empty};

use super::{
    super::CudaGpu,
    attention::{Shape, Slot},
};

/// The kernel that lists them.
pub(super) struct Rows(CudaFunction);

/// Where rows begin and how long they are.
pub(super) struct Offsets {
    /// i32 `[rows]`.
    pub(super) lengths: Tensor,
    /// i64 `[3, rows + 1 or more]`, in elements: of queries, of keys, of statistics.
    offsets: Tensor,
}

impl Rows {
    pub(super) fn new(gpu: &CudaGpu) -> Result<Self> {
        let module = gpu.compile("rows.cu", include_str!("rows.cu"), &[])?;
        Ok(Self(module.load_function("packed_rows").w()?))
    }

    /// The rows of `table`, and rows of length 0 behind them up to those of `shape`.
    pub(super) fn offsets(&self, gpu: &CudaGpu, rows: &AttentionRows, shape: Shape) -> Result<Offsets> {
        const THREADS: u32 = 128;
        let device = rows.table.device();
        // each of the three begins at a multiple of 16 bytes
        let stride = (shape.rows + 1).next_multiple_of(2);
        let lengths = empty(shape.rows, DType::I32, device)?;
        let offsets = empty((3, stride), DType::I64, device)?;
        let (table, lengths_at, offsets_at) =
            (gpu.address(&rows.table)?, gpu.address(&lengths)?, gpu.address(&offsets)?);
        let widths = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.heads];
        let numbers = [rows.rows, shape.rows, stride, widths[0], widths[1], widths[2]];
        let numbers = numbers.map(u32::try_from);
        let [Ok(count), Ok(slots), Ok(stride), Ok(queries), Ok(keys), Ok(stats)] = numbers else {
            return Err(Error::Device { device: gpu.name(), reason: "an attention's shape is too large".into() });
        };
        let mut launch = gpu.stream.launch_builder(&self.0);
        launch.arg(&table).arg(&lengths_at).arg(&offsets_at).arg(&count).arg(&slots).arg(&stride);
        launch.arg(&queries).arg(&keys).arg(&stats);
        let config =
            LaunchConfig { grid_dim: (slots / THREADS + 1, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel's signature, and it writes no more than the tensors hold.
        unsafe { launch.launch(config) }.w()?;
        Ok(Offsets { lengths, offsets })
    }
}

impl Offsets {
    /// What a plan wants of them.
    pub(super) fn places(&self, gpu: &CudaGpu) -> Result<Vec<(Slot, CUdeviceptr)>> {
        let mut places = vec![(Slot::Lengths, gpu.address(&self.lengths)?)];
        for (index, slot) in [Slot::QueryOffsets, Slot::KeyOffsets, Slot::StatsOffsets].into_iter().enumerate() {
            places.push((slot, gpu.address(&self.offsets.get(index)?)?));
        }
        Ok(places)
    }
}
