//! Attention on tensor cores: `kernels/attention.cu` compiled for a dtype, a head's width and this device.

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{
    DType, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, result, sys},
    },
};
use pmetal_metal::{AttentionRows, AttentionSpec, Error, Result, empty, pitch};

use super::CudaGpu;

const TEXT: &str = concat!(
    include_str!("../../kernels/attention_tiles.cuh"),
    include_str!("../../kernels/attention_softmax.cuh"),
    "#line 1 \"attention.cu\"\n",
    include_str!("../../kernels/attention.cu")
);

/// The kernels that were asked for, compiled.
#[derive(Default)]
pub(super) struct Attention {
    built: RwLock<HashMap<(DType, usize), Arc<Built>>>,
}

struct Built {
    plan: Plan,
    forward: CudaFunction,
    dq: CudaFunction,
    dkv: CudaFunction,
}

impl Attention {
    /// Fills `out` and returns the scores' log2-sum-exp2, `[heads, tokens]` f32; none where there is no kernel for the dtype, the width
    /// of the heads or the device.
    pub(super) fn forward(
        &self,
        gpu: &CudaGpu,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<Option<Tensor>> {
        let Some(built) = self.built(gpu, q.dtype(), spec.head_dim)? else { return Ok(None) };
        let tokens = q.dim(0)?;
        let stats = empty((spec.heads, tokens), DType::F32, q.device())?;
        let plan = built.plan;
        let grid = [spec.heads, rows.rows, rows.max_q_len.div_ceil(plan.forward.rows())];
        let mut call = Launch::new(gpu, grid, plan.forward.threads(), plan.forward_bytes());
        call.tensors(&[q, k, v, out])?;
        call.tables(&[&stats, &rows.table])?;
        call.numbers(&[tokens, spec.heads, spec.kv_heads])?;
        call.run(&built.forward, pitches(&[q, k, v, out]), spec.scale)?;
        Ok(Some(stats))
    }

    /// Fills `[dq, dk, dv]` from what the forward left.
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
    ) -> Result<()> {
        let built = self.built(gpu, q.dtype(), spec.head_dim)?.ok_or_else(|| Error::Device {
            device: gpu.name(),
            reason: format!("no attention on tensor cores for heads of {} in {:?}", spec.head_dim, q.dtype()),
        })?;
        let (plan, tokens) = (built.plan, q.dim(0)?);
        let pitches = pitches(&[q, k, v, out, dout, dq, dk, dv]);
        let numbers = [tokens, spec.heads, spec.kv_heads];
        let delta = empty((spec.heads, tokens), DType::F32, q.device())?;
        let grid = [spec.heads, rows.rows, rows.max_q_len.div_ceil(plan.dq.rows())];
        let mut call = Launch::new(gpu, grid, plan.dq.threads(), plan.dq_bytes());
        call.tensors(&[q, k, v, dout, out])?;
        call.tables(&[stats, &delta])?;
        call.tensors(&[dq])?;
        call.tables(&[&rows.table])?;
        call.numbers(&numbers)?;
        call.run(&built.dq, pitches, spec.scale)?;

        let grid = [spec.kv_heads, rows.rows, rows.max_kv_len.div_ceil(plan.dkv.rows())];
        let mut call = Launch::new(gpu, grid, plan.dkv.threads(), plan.dkv_bytes());
        call.tensors(&[q, k, v, dout])?;
        call.tables(&[stats, &delta])?;
        call.tensors(&[dk, dv])?;
        call.tables(&[&rows.table])?;
        call.numbers(&numbers)?;
        call.run(&built.dkv, pitches, spec.scale)
    }

    fn built(&self, gpu: &CudaGpu, dtype: DType, head_dim: usize) -> Result<Option<Arc<Built>>> {
        let key = (dtype, head_dim);
        if let Some(built) = self.built.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Some(built.clone()));
        }
        let name = match dtype {
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            _ => return Ok(None),
        };
        let Some(plan) = Plan::of(gpu, head_dim)? else { return Ok(None) };
        let options = plan.options(name);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let module = gpu.compile("attention.cu", TEXT, &options)?;
        let load = |name, bytes: usize| {
            let function = module.load_function(name).w()?;
            let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(shared, number(gpu, bytes)?).w()?;
            Ok::<_, Error>(function)
        };
        let built = Arc::new(Built {
            plan,
            forward: load("attention_forward", plan.forward_bytes())?,
            dq: load("attention_dq", plan.dq_bytes())?,
            dkv: load("attention_dkv", plan.dkv_bytes())?,
        });
        self.built.write().unwrap_or_else(PoisonError::into_inner).insert(key, built.clone());
        Ok(Some(built))
    }
}

/// The widest heads that these kernels take.
pub(super) const WIDEST: usize = 128;

/// How a kernel's work is cut, as its text has the host define.
#[derive(Clone, Copy)]
struct Cut {
    /// Groups of four warps in a block, each with 64 rows of its own.
    groups: usize,
    /// Rows of a tile that streams past: 64 or 128.
    tile: usize,
    /// Tiles in shared memory at a time.
    stages: usize,
}

impl Cut {
    fn rows(self) -> usize {
        self.groups * 64
    }

    fn threads(self) -> usize {
        self.groups * 128
    }

    fn options(self, kernel: &str) -> [String; 3] {
        [("GROUPS", self.groups), ("TILE", self.tile), ("STAGES", self.stages)]
            .map(|(name, value)| format!("-D{kernel}_{name}={value}"))
    }
}

/// The cuts of the three kernels for heads of one width.
#[derive(Clone, Copy)]
struct Plan {
    head_dim: usize,
    forward: Cut,
    dq: Cut,
    dkv: Cut,
}

impl Plan {
    /// The cuts measured best on an H100 and an H200, with wgmma and without; the latter fit every chip since sm_80.
    fn of(gpu: &CudaGpu, head_dim: usize) -> Result<Option<Self>> {
        let capability = gpu.context.compute_capability().w()?;
        if capability < (8, 0) || head_dim == 0 || head_dim > WIDEST || !head_dim.is_multiple_of(8) {
            return Ok(None);
        }
        let shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared = usize::try_from(gpu.context.attribute(shared).w()?).unwrap_or_default();
        let cut = |groups, tile, stages| Cut { groups, tile, stages };
        let all = |cut| Self { head_dim, forward: cut, dq: cut, dkv: cut };
        let plan = match (capability, head_dim) {
            ((9, 0), ..=64) => Self { forward: cut(1, 64, 2), ..all(cut(1, 64, 3)) },
            ((9, 0), _) => Self { head_dim, forward: cut(2, 128, 2), dq: cut(1, 64, 2), dkv: cut(2, 64, 3) },
            _ => all(cut(1, 64, 2)),
        };
        let needed = plan.forward_bytes().max(plan.dq_bytes()).max(plan.dkv_bytes());
        Ok((needed <= shared).then_some(plan))
    }

    fn options(&self, dtype: &str) -> Vec<String> {
        let kernels = [("FORWARD", self.forward), ("DQ", self.dq), ("DKV", self.dkv)];
        let cuts = kernels.into_iter().flat_map(|(kernel, cut)| cut.options(kernel));
        [format!("-D{dtype}"), format!("-DD={}", self.head_dim)].into_iter().chain(cuts).collect()
    }

    /// Shared memory of `rows` rows in tiles, and what begins them on a multiple of 1024 bytes.
    fn bytes(&self, rows: usize) -> usize {
        rows * self.head_dim.next_multiple_of(64) * 2 + 1024
    }

    fn forward_bytes(&self) -> usize {
        self.bytes(self.forward.rows() + self.forward.stages * 2 * self.forward.tile)
    }

    fn dq_bytes(&self) -> usize {
        self.bytes(2 * self.dq.rows() + self.dq.stages * 2 * self.dq.tile)
    }

    fn dkv_bytes(&self) -> usize {
        self.bytes(2 * self.dkv.rows() + self.dkv.stages * 2 * self.dkv.tile) + self.dkv.stages * 1024
    }
}

/// A launch whose arguments are gathered in the order of the kernel's signature.
struct Launch<'a> {
    gpu: &'a CudaGpu,
    grid: [usize; 3],
    threads: usize,
    shared: usize,
    addresses: Vec<sys::CUdeviceptr>,
    numbers: Vec<i32>,
}

impl<'a> Launch<'a> {
    fn new(gpu: &'a CudaGpu, grid: [usize; 3], threads: usize, shared: usize) -> Self {
        Self { gpu, grid, threads, shared, addresses: Vec::new(), numbers: Vec::new() }
    }

    /// Tensors `[tokens, heads * head_dim]`, whose rows the kernels read 16 bytes at a time.
    fn tensors(&mut self, tensors: &[&Tensor]) -> Result<()> {
        for tensor in tensors {
            let address = self.gpu.address(tensor)?;
            if !pitch(tensor).is_some_and(|pitch| pitch.is_multiple_of(8)) || address % 16 != 0 {
                return Err(Error::Buffer {
                    kernel: "attention.cu",
                    buffer: "a tensor",
                    expected: "contiguous rows from multiples of 16 bytes on".into(),
                    got: format!("{:?} with strides {:?} at {address}", tensor.dims(), tensor.stride()),
                });
            }
            self.addresses.push(address);
        }
        Ok(())
    }

    fn tables(&mut self, tensors: &[&Tensor]) -> Result<()> {
        for tensor in tensors {
            self.addresses.push(self.gpu.address(tensor)?);
        }
        Ok(())
    }

    fn numbers(&mut self, numbers: &[usize]) -> Result<()> {
        for &n in numbers {
            self.numbers.push(number(self.gpu, n)?);
        }
        Ok(())
    }

    fn run(mut self, function: &CudaFunction, mut pitches: [u32; 8], mut scale: f32) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        let mut arguments: Vec<*mut c_void> = Vec::new();
        arguments.extend(self.addresses.iter_mut().map(|at| ptr::from_mut(at).cast::<c_void>()));
        arguments.extend(self.numbers.iter_mut().map(|n| ptr::from_mut(n).cast::<c_void>()));
        arguments.push(ptr::from_mut(&mut pitches).cast());
        arguments.push(ptr::from_mut(&mut scale).cast());
        let [x, y, z] = self.grid.map(|n| number(self.gpu, n).map(i32::unsigned_abs));
        let (groups, threads) = ((x?, y?, z?), (number(self.gpu, self.threads)?.unsigned_abs(), 1, 1));
        let shared = number(self.gpu, self.shared)?.unsigned_abs();
        self.gpu.context.bind_to_thread().w()?;
        let stream = self.gpu.stream.cu_stream();
        // SAFETY: the callers gather the arguments in the order of the kernel's signature, tensors checked for shape and alignment; the
        // driver has copied the arguments when it returns. See `CudaGpu::address` for the memory they point to.
        let launched =
            unsafe { result::launch_kernel(function.cu_function(), groups, threads, shared, stream, &mut arguments) };
        Ok(launched.w()?)
    }
}

/// The kernels' `Pitches`, of `[q, k, v, out]` and in the backward `[dout, dq, dk, dv]`; [`Launch::tensors`] refuses what has none.
fn pitches(tensors: &[&Tensor]) -> [u32; 8] {
    let mut all = [0; 8];
    for (to, tensor) in all.iter_mut().zip(tensors) {
        *to = pitch(tensor).and_then(|pitch| u32::try_from(pitch).ok()).unwrap_or_default();
    }
    all
}

/// A number as the kernels take it.
fn number(gpu: &CudaGpu, n: usize) -> Result<i32> {
    i32::try_from(n)
        .map_err(|_| Error::Device { device: gpu.name(), reason: format!("attention over {n} is too large") })
}
