//! Attention by cuDNN where the machine has it: packed rows, causal, windows, caps on scores, heads sharing keys, bf16 and f16.
//!
//! The library is loaded at run time; without it, or where it has no kernel, our own kernels serve.

mod attention;
mod graph;
mod library;
mod rows;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{
    DType, Tensor,
    cuda_backend::{WrapErr, cudarc::driver::sys},
};
use pmetal_metal::{AttentionRows, AttentionSpec, Reach, Result, empty, limits, pitch};

use self::{
    attention::{Attention, Pitches, Shape, Slot},
    graph::Number,
    library::Library,
    rows::{Offsets, Rows},
};
use super::CudaGpu;

/// The oldest version that is asked: the first whose results were held against the formula. Of 9.14, heads of 256 came out wrong.
const OLDEST: usize = 91_900;

/// Bytes of scratch memory at most: beyond, our own kernels serve. Only a deterministic backward takes any, and a lot at great lengths.
const MOST_SCRATCH: usize = 1 << 30;

/// Attention by cuDNN on one device's stream.
pub(super) struct Cudnn {
    state: Mutex<State>,
    rows: Rows,
    version: usize,
    deterministic: bool,
}

/// What one thread at a time may use.
struct State {
    library: Arc<Library>,
    /// Forward and backward; none where there is no kernel.
    plans: HashMap<Shape, Option<[Attention; 2]>>,
}

impl Cudnn {
    /// cuDNN behind the device's stream; none where the machine has none that is new enough. Its backward adds up the gradient of the
    /// queries in whatever order comes, or else `deterministic`ally, which takes more time and a matrix of scores of scratch memory.
    ///
    /// # Errors
    /// Where the kernel that lists the rows cannot be compiled.
    pub(super) fn open(gpu: &CudaGpu, deterministic: bool) -> Result<Option<Self>> {
        let rows = Rows::new(gpu)?;
        let Some(library) = Library::open(gpu.stream.cu_stream().cast()) else { return Ok(None) };
        let version = library.version();
        let state = Mutex::new(State { library, plans: HashMap::new() });
        Ok((version >= OLDEST).then_some(Self { state, rows, version, deterministic }))
    }

    /// For people, as in `9.19.0`.
    pub(super) fn version(&self) -> String {
        format!("{}.{}.{}", self.version / 10_000, self.version / 100 % 100, self.version % 100)
    }

    /// Whether it is worth asking: where heads are wider than our kernels take, and where rows are long on average. Forward and backward
    /// together on an H200 (ours, then cuDNN's in PyTorch 2.11), 16 heads of 128 over 8 of keys: 0.55 and 0.70 ms at 4 rows of 2,048, 2.09
    /// and 1.93 at 1 of 8,192, 33.0 and 28.2 at 1 of 32,768; ours is the faster for heads of 64.
    /// Where there are windows or caps, ours serve what they take: there the two were not measured against each other.
    pub(super) const fn pays(tokens: usize, rows: &AttentionRows, spec: &AttentionSpec) -> bool {
        spec.head_dim > super::attention::WIDEST || (spec.is_plain() && tokens >= 16_384 * rows.rows)
    }

    /// Fills `out` and returns the statistics, f32 `[tokens, heads]`; none where cuDNN does not serve. Tokens in no row stay as they
    /// are. Tensors are as [`pmetal_metal::Gpu::attention_forward`] says. The first call of a shape makes its plans, which takes up to
    /// two seconds, mostly once for a head's width and dtype, and must not happen inside a capture.
    ///
    /// # Errors
    /// cuDNN's words where it fails; where memory is full.
    pub(super) fn forward(
        &self,
        gpu: &CudaGpu,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<Option<Tensor>> {
        let [q, k, v] = &[readable(q, spec)?, readable(k, spec)?, readable(v, spec)?];
        let result = if wants_contiguous(spec) { &fresh(out)? } else { out };
        let Some(shape) = self.shape([q, k, v, result], rows, spec) else { return Ok(None) };
        let mut state = self.state();
        let Some([plan, _]) = state.plans(shape) else { return Ok(None) };
        let stats = empty((q.dim(0)?, spec.heads), DType::F32, q.device())?;
        let tensors = [(Slot::Q, q), (Slot::K, k), (Slot::V, v), (Slot::Out, result), (Slot::Stats, &stats)];
        let offsets = self.rows.offsets(gpu, rows, shape)?;
        run(gpu, plan, &tensors, &offsets, spec)?;
        if result.id() != out.id() {
            copy_rows(gpu, result, out)?;
        }
        Ok(Some(stats))
    }

    /// Fills `[dq, dk, dv]`; false where cuDNN does not serve, which is so for the forward and the backward of a shape alike.
    ///
    /// # Errors
    /// As for the forward.
    #[allow(clippy::too_many_arguments, reason = "what the formula needs")]
    pub(super) fn backward(
        &self,
        gpu: &CudaGpu,
        dout: &Tensor,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        stats: &Tensor,
        [dq, dk, dv]: [&Tensor; 3],
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<bool> {
        let [q, k, v, out] = &[readable(q, spec)?, readable(k, spec)?, readable(v, spec)?, readable(out, spec)?];
        let Some(shape) = self.shape([q, k, v, out], rows, spec) else { return Ok(false) };
        let mut state = self.state();
        let Some([_, plan]) = state.plans(shape) else { return Ok(false) };
        let (all, device) = (q.shape(), q.device());
        let dout = &dout.contiguous()?;
        let places = [dq, dk, dv];
        let [dq, dk, dv] = &[fresh(dq)?, fresh(dk)?, fresh(dv)?];
        let row_sum = empty(stats.shape(), DType::F32, device)?;
        let mut tensors = vec![
            (Slot::Q, q),
            (Slot::K, k),
            (Slot::V, v),
            (Slot::Out, out),
            (Slot::Stats, stats),
            (Slot::Dout, dout),
            (Slot::Dq, dq),
            (Slot::Dk, dk),
            (Slot::Dv, dv),
            (Slot::RowSum, &row_sum),
        ];
        let mut scratch = Vec::new();
        if !shape.deterministic {
            scratch.push((Slot::DqSum, empty(all, DType::F32, device)?));
        }
        if shape.heads != shape.kv_heads {
            scratch.push((Slot::DkHeads, empty(all, q.dtype(), device)?));
            scratch.push((Slot::DvHeads, empty(all, q.dtype(), device)?));
        }
        tensors.extend(scratch.iter().map(|(slot, tensor)| (*slot, tensor)));
        let offsets = self.rows.offsets(gpu, rows, shape)?;
        run(gpu, plan, &tensors, &offsets, spec)?;
        for (from, to) in [dq, dk, dv].into_iter().zip(places).filter(|(_, to)| !to.is_contiguous()) {
            copy_rows(gpu, from, to)?;
        }
        Ok(true)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // plans are put in whole
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shape whose plans serve; none where there are none for sure. Lengths and numbers of rows are rounded up by an eighth at
    /// most, as a rule: few plans serve all batches of a run, and what a plan has too much of ends at once.
    fn shape(&self, [q, k, v, out]: [&Tensor; 4], rows: &AttentionRows, spec: &AttentionSpec) -> Option<Shape> {
        let number = match q.dtype() {
            DType::BF16 => Number::Bf16,
            DType::F16 => Number::F16,
            _ => return None,
        };
        let served = rows.packed
            && !matches!(spec.reach, Reach::Chunk(_))
            && rows.rows > 0
            && rows.max_q_len > 0
            && spec.head_dim.is_multiple_of(16)
            && spec.kv_heads > 0
            && spec.heads.is_multiple_of(spec.kv_heads);
        let pitches = Pitches { q: pitch(q)?, k: pitch(k)?, v: pitch(v)?, out: pitch(out)? };
        served.then_some(Shape {
            rows: rounded(rows.rows, 1),
            length: rounded(rows.max_q_len, 128),
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            number,
            deterministic: self.deterministic,
            windowed: spec.reach != Reach::All,
            capped: spec.softcap.is_some(),
            pitches,
        })
    }
}

impl State {
    fn plans(&mut self, shape: Shape) -> Option<&[Attention; 2]> {
        let library = &self.library;
        let make = || {
            // whatever it says against a shape, our kernels serve it
            let plans = [Attention::forward(library, shape).ok()?, Attention::backward(library, shape).ok()?];
            plans.iter().all(|plan| plan.workspace() <= MOST_SCRATCH).then_some(plans)
        };
        self.plans.entry(shape).or_insert_with(make).as_ref()
    }
}

/// Whether rows with a pitch are copied: with cuDNN 9.19 their gradients were wrong for heads of 256, and right up to 128.
const fn wants_contiguous(spec: &AttentionSpec) -> bool {
    spec.head_dim > super::attention::WIDEST
}

/// The tensor as cuDNN reads it.
fn readable(tensor: &Tensor, spec: &AttentionSpec) -> Result<Tensor> {
    Ok(if wants_contiguous(spec) { tensor.contiguous()? } else { tensor.clone() })
}

/// The tensor itself where it is contiguous, else room for as much.
fn fresh(tensor: &Tensor) -> Result<Tensor> {
    if tensor.is_contiguous() { Ok(tensor.clone()) } else { empty(tensor.shape(), tensor.dtype(), tensor.device()) }
}

/// Copies a contiguous matrix into rows with a pitch.
fn copy_rows(gpu: &CudaGpu, from: &Tensor, to: &Tensor) -> Result<()> {
    let ((rows, width), size) = (from.dims2()?, from.dtype().size_in_bytes());
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: ptr::null(),
        srcDevice: gpu.address(from)?,
        srcArray: ptr::null_mut(),
        srcPitch: width * size,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: ptr::null_mut(),
        dstDevice: gpu.address(to)?,
        dstArray: ptr::null_mut(),
        dstPitch: pitch(to).unwrap_or(width) * size,
        WidthInBytes: width * size,
        Height: rows,
    };
    gpu.context.bind_to_thread().w()?;
    // SAFETY: both are matrices of these rows in the device's memory; see `CudaGpu::address`.
    Ok(unsafe { sys::cuMemcpy2DAsync_v2(&copy, gpu.stream.cu_stream()) }.result().w()?)
}

/// `n` up to a multiple of an eighth of the next power of two, or of `least`.
const fn rounded(n: usize, least: usize) -> usize {
    let step = n.next_power_of_two() / 8;
    n.next_multiple_of(if step > least { step } else { least })
}

/// Runs a plan behind all that was asked for before.
fn run(
    gpu: &CudaGpu,
    plan: &Attention,
    tensors: &[(Slot, &Tensor)],
    offsets: &Offsets,
    spec: &AttentionSpec,
) -> Result<()> {
    let device = offsets.lengths.device();
    let workspace = empty(plan.workspace().max(1), DType::U8, device)?;
    let mut places = offsets.places(gpu)?;
    for &(slot, tensor) in tensors {
        places.push((slot, gpu.address(tensor)?));
    }
    let (scale, minus_infinity, one) = (spec.scale, f32::NEG_INFINITY, 1f32);
    let ([window, _], cap) = (limits(spec.reach).map(|keys| keys as f32), spec.softcap.unwrap_or_default());
    let host = |number: &f32| ptr::from_ref(number).cast_mut().cast::<c_void>();
    let address = |slot| match slot {
        Slot::Scale => host(&scale),
        Slot::MinusInfinity => host(&minus_infinity),
        Slot::One => host(&one),
        Slot::Window => host(&window),
        Slot::Cap => host(&cap),
        other => match places.iter().find(|&&(slot, _)| slot == other) {
            Some(&(_, at)) => at as *mut c_void,
            None => ptr::null_mut(),
        },
    };
    plan.run(address, gpu.address(&workspace)? as *mut c_void)
}
