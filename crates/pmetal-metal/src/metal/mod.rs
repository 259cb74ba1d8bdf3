//! Metal through candle's device.
//!
//! Kernels are encoded into candle's own command encoder, behind and before candle's own, with every buffer declared as the kernel's
//! signature says: candle's buffers are untracked by Metal, and candle puts barriers and fences where declared buffers call for them.

mod facts;
mod gemm;
mod library;
mod memory;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use candle_core::{DType, Device, MetalDevice, Storage, Tensor, metal_backend::DeviceId};
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline, Device as RawDevice};
use objc2_metal::MTLSize;

use crate::{
    Access, AttentionRows, AttentionSpec, Call, Error, Facts, Gemm, Gpu, Memory, Result, Statistics,
    attention_backward, attention_forward,
};

pub(crate) use memory::reserve;
pub use memory::{exact, exact_zeros};

/// The default Metal device.
///
/// # Errors
/// When there is none: a virtual machine without a GPU, a session without access to it.
pub fn open() -> Result<Device> {
    // candle takes the first of the list without looking
    if RawDevice::all().is_empty() {
        return Err(Error::Device { device: "Metal".into(), reason: "this machine offers no Metal device".into() });
    }
    Ok(Device::new_metal(0)?)
}

/// The device as operations use it: the same for every clone of `device`.
///
/// # Errors
/// None today.
pub fn gpu(device: &MetalDevice) -> Result<Arc<dyn Gpu>> {
    Ok(of(device))
}

fn of(device: &MetalDevice) -> Arc<Metal> {
    static OPEN: Mutex<Option<HashMap<DeviceId, Arc<Metal>>>> = Mutex::new(None);
    let mut open = lock(&OPEN);
    let metal = open.get_or_insert_default().entry(device.id()).or_insert_with(|| {
        let has_matrices = facts::has_matrices(device);
        Arc::new(Metal { device: device.clone(), programs: Mutex::default(), peak: AtomicU64::new(0), has_matrices })
    });
    Arc::clone(metal)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A Metal device.
struct Metal {
    device: MetalDevice,
    programs: Mutex<library::Programs>,
    /// The most bytes seen in use.
    peak: AtomicU64,
    /// Whether it has `simdgroup_matrix`.
    has_matrices: bool,
}

/// What a command buffer may hold in floating-point operations. macOS ends command buffers that keep the screen waiting for seconds; the
/// slowest GPU of this kind, an M1's, does this much in about half a second.
const OPERATIONS_PER_COMMAND_BUFFER: f64 = 1e12;

/// candle commits a command buffer at every 50th encoder that is asked for, unless an environment variable says otherwise.
const ENCODERS_PER_COMMAND_BUFFER: f64 = 50.0;

impl Metal {
    fn name(&self) -> String {
        facts::name(&self.device)
    }

    fn failed(&self, reason: impl ToString) -> Error {
        Error::Device { device: self.name(), reason: reason.to_string() }
    }

    fn pipeline(&self, call: &Call) -> Result<ComputePipeline> {
        let pipeline = lock(&self.programs)
            .pipeline(self.device.metal_device(), call.kernel, call.dtype)
            .map_err(|reason| self.failed(reason))?;
        let most = pipeline.max_total_threads_per_threadgroup();
        if call.grid.threads > most {
            let Call { kernel, grid, .. } = call;
            return Err(self.failed(format!(
                "kernel {} runs in threadgroups of {} threads, this GPU has registers for {most}",
                kernel.name, grid.threads
            )));
        }
        Ok(pipeline)
    }

    fn bind(&self, encoder: &ComputeCommandEncoder, call: &Call) -> Result<()> {
        for (index, (buffer, tensor)) in call.kernel.buffers.iter().zip(call.buffers).enumerate() {
            let (storage, layout) = tensor.storage_and_layout();
            let Storage::Metal(storage) = &*storage else {
                return Err(Error::Buffer {
                    kernel: call.kernel.name,
                    buffer: buffer.name,
                    expected: "on a Metal device".into(),
                    got: format!("on {:?}", tensor.device().location()),
                });
            };
            let offset = layout.start_offset() * tensor.dtype().size_in_bytes();
            match buffer.access {
                Access::Read => encoder.set_input_buffer(index, Some(storage.buffer()), offset),
                Access::Write | Access::Update => encoder.set_output_buffer(index, Some(storage.buffer()), offset),
            }
        }
        encoder.set_bytes_directly(call.kernel.buffers.len(), call.params.len(), call.params.as_ptr().cast());
        Ok(())
    }

    /// Counts `operations` just encoded: work that is long gets command buffers of few kernels. An encoder that is asked for and left
    /// empty counts, and costs a lock.
    fn weigh(&self, operations: f64) -> Result<()> {
        let share = (operations / OPERATIONS_PER_COMMAND_BUFFER).min(1.0);
        for _ in 0..(share * ENCODERS_PER_COMMAND_BUFFER) as usize {
            drop(self.device.command_encoder()?);
        }
        Ok(())
    }
}

/// Floating-point operations of an attention's forward, at most: every row as long as the longest.
fn operations(rows: &AttentionRows, spec: &AttentionSpec) -> f64 {
    let scores = rows.rows as f64 * rows.max_q_len as f64 * rows.max_kv_len as f64 * spec.heads as f64;
    4.0 * scores * spec.head_dim as f64
}

impl Gpu for Metal {
    fn launch(&self, call: &Call) -> Result<()> {
        let pipeline = self.pipeline(call)?;
        let guard = self.device.command_encoder()?;
        let encoder: &ComputeCommandEncoder = guard.as_ref();
        encoder.set_compute_pipeline_state(&pipeline);
        self.bind(encoder, call)?;
        let [width, height, depth] = call.grid.groups;
        let threads = MTLSize { width: call.grid.threads, height: 1, depth: 1 };
        encoder.dispatch_thread_groups(MTLSize { width, height, depth }, threads);
        Ok(())
    }

    fn gemm(&self, product: &Gemm) -> Result<()> {
        gemm::gemm(self, product)
    }

    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<Option<Statistics>> {
        if !self.has_matrices {
            return Ok(None);
        }
        let stats = attention_forward(self, [q, k, v], out, rows, spec)?;
        if stats.is_some() {
            self.weigh(operations(rows, spec))?;
        }
        Ok(stats.map(Statistics::Natural))
    }

    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: [&Tensor; 3],
        out: &Tensor,
        stats: &Tensor,
        grads: [&Tensor; 3],
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<()> {
        attention_backward(self, dout, qkv, out, stats, grads, rows, spec)?;
        // seven products instead of two
        self.weigh(3.5 * operations(rows, spec))
    }

    fn synchronize(&self) -> Result<()> {
        // the wait frees what candle's pool no longer lends
        self.live();
        Ok(self.device.wait_until_completed()?)
    }

    /// `live` is what Metal has allocated for this process, with what candle's pool keeps for reuse. `peak` is the most that was seen
    /// at an allocation, a wait, or a call of this; the pool frees in waits only, so little is missed between. `total` is what Metal
    /// recommends as the largest working set.
    fn memory(&self) -> Result<Memory> {
        let live = self.live();
        let total = self.device.recommended_max_working_set_size() as u64;
        Ok(Memory { live, peak: self.peak.load(Ordering::Relaxed), total })
    }

    fn reset_peak(&self) -> Result<()> {
        self.peak.store(0, Ordering::Relaxed);
        self.live();
        Ok(())
    }

    fn facts(&self) -> Facts {
        facts::facts(&self.device)
    }
}

/// What a kernel is compiled for, in Metal's words.
fn type_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float"),
        DType::F16 => Some("half"),
        DType::BF16 => Some("bfloat"),
        _ => None,
    }
}
