//! Attention on tensor cores: `kernels/attention.cu`, or `attention_hopper.cu` where it is the faster, compiled for a dtype, a head's width,
//! whether queries see less than every key up to their own and scores have a cap, and this device.

mod launch;
mod plan;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{
    DType, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, sys},
    },
};
use pmetal_metal::{AttentionRows, AttentionSpec, Error, Result, empty};

use self::launch::{Launch, Side, number, pitches};
pub(super) use self::plan::WIDEST;
use self::plan::{Cut, Plan, Variant};
use super::CudaGpu;

/// The kernels that were asked for, compiled.
#[derive(Default)]
pub(super) struct Attention {
    built: RwLock<HashMap<(DType, Variant), Arc<Built>>>,
}

struct Built {
    forward: Kernel,
    dq: Kernel,
    dkv: Kernel,
}

struct Kernel {
    function: CudaFunction,
    cut: Cut,
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
        let Some(built) = self.built(gpu, q.dtype(), spec)? else { return Ok(None) };
        let tokens = q.dim(0)?;
        let stats = empty((spec.heads, tokens), DType::F32, q.device())?;
        let mut call = Launch::new(gpu, &built.forward);
        call.tensors(&[q, k, v, out])?;
        call.numbers_of(&[&stats])?;
        call.rows(rows, Side::Queries, spec.heads)?;
        call.run(tokens, pitches(&[q, k, v, out]), spec)?;
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
        let built = self.built(gpu, q.dtype(), spec)?.ok_or_else(|| Error::Device {
            device: gpu.name(),
            reason: format!("no attention on tensor cores for heads of {} in {:?}", spec.head_dim, q.dtype()),
        })?;
        let (tokens, pitches) = (q.dim(0)?, pitches(&[q, k, v, out, dout, dq, dk, dv]));
        let delta = empty((spec.heads, tokens), DType::F32, q.device())?;
        let mut call = Launch::new(gpu, &built.dq);
        call.tensors(&[q, k, v, dout, out])?;
        call.numbers_of(&[stats, &delta])?;
        call.tensors(&[dq])?;
        call.rows(rows, Side::Queries, spec.heads)?;
        call.run(tokens, pitches, spec)?;

        let mut call = Launch::new(gpu, &built.dkv);
        call.tensors(&[q, k, v, dout])?;
        call.numbers_of(&[stats, &delta])?;
        call.tensors(&[dk, dv])?;
        call.rows(rows, Side::Keys, spec.kv_heads)?;
        call.run(tokens, pitches, spec)
    }

    fn built(&self, gpu: &CudaGpu, dtype: DType, spec: &AttentionSpec) -> Result<Option<Arc<Built>>> {
        let variant = Variant::of(spec);
        let key = (dtype, variant);
        if let Some(built) = self.built.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Some(built.clone()));
        }
        let name = match dtype {
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            _ => return Ok(None),
        };
        let Some(plan) = Plan::of(gpu, variant)? else { return Ok(None) };
        let options = plan.options(name);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let (file, text) = plan.text();
        let module = gpu.compile(file, text, &options)?;
        let load = |name, cut: Cut| {
            let function = module.load_function(name).w()?;
            let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(shared, number(gpu, cut.shared)?).w()?;
            Ok::<_, Error>(Kernel { function, cut })
        };
        let built = Arc::new(Built {
            forward: load("attention_forward", plan.forward)?,
            dq: load("attention_dq", plan.dq)?,
            dkv: load("attention_dkv", plan.dkv)?,
        });
        self.built.write().unwrap_or_else(PoisonError::into_inner).insert(key, built.clone());
        Ok(Some(built))
    }
}
