//! Launches of attention's kernels.

use std::{ffi::c_void, ptr};

use candle_core::{
    Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{result, sys},
    },
};
use pmetal_metal::{AttentionRows, AttentionSpec, Error, Result, limits, pitch};

use super::{super::CudaGpu, Kernel};

/// Whose blocks a kernel's items are.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Queries,
    Keys,
}

/// A launch whose arguments are gathered in the order of the kernel's signature.
pub(super) struct Launch<'a> {
    gpu: &'a CudaGpu,
    kernel: &'a Kernel,
    grid: [usize; 3],
    addresses: Vec<sys::CUdeviceptr>,
    numbers: Vec<i32>,
}

impl<'a> Launch<'a> {
    pub(super) fn new(gpu: &'a CudaGpu, kernel: &'a Kernel) -> Self {
        Self { gpu, kernel, grid: [0; 3], addresses: Vec::new(), numbers: Vec::new() }
    }

    /// Tensors `[tokens, heads * head_dim]`, whose rows the kernels read 16 bytes at a time.
    pub(super) fn tensors(&mut self, tensors: &[&Tensor]) -> Result<()> {
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

    /// Contiguous numbers of queries and heads.
    pub(super) fn numbers_of(&mut self, tensors: &[&Tensor]) -> Result<()> {
        for tensor in tensors {
            self.addresses.push(self.gpu.address(tensor)?);
        }
        Ok(())
    }

    /// The rows, and blocks for `heads` heads: as many as there may be, or those of a list for as many blocks as run at a time.
    pub(super) fn rows(&mut self, rows: &AttentionRows, side: Side, heads: usize) -> Result<()> {
        let cut = self.kernel.cut;
        let (blocks, longest) = match side {
            Side::Queries => (&rows.query_blocks, rows.max_q_len),
            Side::Keys => (&rows.key_blocks, rows.max_kv_len),
        };
        self.addresses.push(self.gpu.address(&rows.table)?);
        self.grid = [heads, rows.rows, longest.div_ceil(cut.rows())];
        if cut.is_listed() {
            let processors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
            let processors = usize::try_from(self.gpu.context.attribute(processors).w()?).unwrap_or(1);
            let items = blocks.dim(0)? * heads;
            self.addresses.push(self.gpu.address(blocks)?);
            self.numbers.push(number(self.gpu, items)?);
            self.grid = [items.min(processors), 1, 1];
        }
        Ok(())
    }

    pub(super) fn run(mut self, tokens: usize, mut pitches: [u32; 8], spec: &AttentionSpec) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        for size in [tokens, spec.heads, spec.kv_heads] {
            self.numbers.push(number(self.gpu, size)?);
        }
        let mut arguments: Vec<*mut c_void> = Vec::new();
        arguments.extend(self.addresses.iter_mut().map(|at| ptr::from_mut(at).cast::<c_void>()));
        arguments.extend(self.numbers.iter_mut().map(|n| ptr::from_mut(n).cast::<c_void>()));
        arguments.push(ptr::from_mut(&mut pitches).cast());
        let (mut scale, mut reach, mut cap) = (spec.scale, limits(spec.reach), spec.softcap.unwrap_or_default());
        arguments.extend([
            ptr::from_mut(&mut scale).cast(),
            ptr::from_mut(&mut reach).cast(),
            ptr::from_mut(&mut cap).cast::<c_void>(),
        ]);
        let [x, y, z] = self.grid.map(|n| number(self.gpu, n).map(i32::unsigned_abs));
        let cut = self.kernel.cut;
        let (groups, threads) = ((x?, y?, z?), (number(self.gpu, cut.threads())?.unsigned_abs(), 1, 1));
        let shared = number(self.gpu, cut.shared)?.unsigned_abs();
        self.gpu.context.bind_to_thread().w()?;
        let (function, stream) = (self.kernel.function.cu_function(), self.gpu.stream.cu_stream());
        // SAFETY: the callers gather the arguments in the order of the kernel's signature, tensors checked for pitch and alignment; the
        // driver has copied the arguments when it returns. See `CudaGpu::address` for the memory they point to.
        let launched = unsafe { result::launch_kernel(function, groups, threads, shared, stream, &mut arguments) };
        Ok(launched.w()?)
    }
}

/// The kernels' `Pitches`, of `[q, k, v, out]` and in the backward `[dout, dq, dk, dv]`; [`Launch::tensors`] refuses what has none.
pub(super) fn pitches(tensors: &[&Tensor]) -> [u32; 8] {
    let mut all = [0; 8];
    for (to, tensor) in all.iter_mut().zip(tensors) {
        *to = pitch(tensor).and_then(|pitch| u32::try_from(pitch).ok()).unwrap_or_default();
    }
    all
}

/// A number as the kernels take it.
pub(super) fn number(gpu: &CudaGpu, n: usize) -> Result<i32> {
    i32::try_from(n)
        .map_err(|_| Error::Device { device: gpu.name(), reason: format!("attention over {n} is too large") })
}
