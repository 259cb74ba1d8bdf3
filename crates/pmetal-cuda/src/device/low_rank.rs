//! Gradients of low-rank adapters on tensor cores: `kernels/low_rank.cu` compiled for a dtype, the adapters' ranks and this device.

mod operands;
mod plan;

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{
    DType,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaContext, CudaFunction, result, sys},
    },
};
use pmetal_metal::{Error, LowRankBackward, LowRankMember, Result, empty};

use self::{
    operands::{Backward, Members, Rows, tokens_of},
    plan::{B_ROWS, Chip, Cut, Plan, ROWS, THREADS},
};
use super::CudaGpu;

const TEXT: &str = include_str!("../../kernels/low_rank.cu");
/// Fewer rows leave most of the chip idle here, and products take no longer than their launch.
const FEWEST_TOKENS: usize = 512;

/// The kernels that were asked for, compiled.
pub(super) struct LowRank {
    /// None where the device is older than the kernels.
    chip: Option<Chip>,
    built: RwLock<HashMap<(DType, Plan), Arc<Built>>>,
}

/// The text compiled for a dtype and a plan.
struct Built {
    plan: Plan,
    outputs: CudaFunction,
    sums: CudaFunction,
}

impl LowRank {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as PROCESSORS,
        };
        let attribute = |which| Ok::<_, Error>(usize::try_from(context.attribute(which).w()?).unwrap_or_default());
        let chip = match context.compute_capability().w()? {
            (9.., _) => Some(Chip { processors: attribute(PROCESSORS)?, shared: attribute(SHARED)? }),
            _ => None,
        };
        Ok(Self { chip, built: RwLock::default() })
    }

    /// As [`pmetal_metal::low_rank_outputs`], in one pass over `dy`; false, and nothing done, where the kernels do not take the operands.
    pub(super) fn outputs(&self, gpu: &CudaGpu, work: &LowRankBackward) -> Result<bool> {
        let (Some(chip), Some(tokens)) = (self.chip, tokens_of(work)?) else { return Ok(false) };
        let rows = |tensor| Rows::of(gpu, tensor);
        let [Some(dy), Some(b)] = [rows(work.dy)?, rows(work.b)?] else { return Ok(false) };
        let [Some(u), Some(du)] = [rows(work.u)?, rows(work.du)?] else { return Ok(false) };
        let Some(built) = self.built(gpu, chip, work.dy.dtype(), work.members)? else { return Ok(false) };
        let plan = &built.plan;
        let Some(members) = Members::of(gpu, work, plan)? else { return Ok(false) };
        let (slices, cut) = (members.slices, Cut::of(chip, tokens, members.slices));
        let du_parts = slices * tokens * plan.ranks;
        let db_parts = cut.splits * slices * plan.columns * plan.ranks;
        let parts = empty(du_parts + db_parts, DType::F32, work.dy.device())?;
        let parts_at = gpu.address(&parts)?;
        let params = Backward {
            dy: dy.map(64, ROWS, plan.columns / 64)?,
            b: b.map(16, B_ROWS, 1)?,
            u: u.map(16, ROWS, plan.ranks / 16)?,
            du: du.at,
            du_pitch: number(gpu, du.pitch)?,
            tokens: number(gpu, tokens)?,
            members: number(gpu, members.count)?,
            slices: number(gpu, slices)?,
            rows: number(gpu, cut.rows)?,
            splits: number(gpu, cut.splits)?,
            du_parts: parts_at,
            db_parts: parts_at + 4 * du_parts as u64,
            member: members.member,
        };
        // SAFETY: `params` are those of the kernel's signature; the operands have the rows and columns that they say, and there is room for
        // every part of a sum.
        unsafe { launch(gpu, &built.outputs, [slices, cut.splits], plan.bytes(), &params) }?;
        let fours = (members.count * tokens + slices * plan.columns) * (plan.ranks / 4);
        number(gpu, fours + THREADS)?;
        // SAFETY: as above.
        unsafe { launch(gpu, &built.sums, [fours.div_ceil(THREADS), 1], 0, &params) }?;
        Ok(true)
    }

    fn built(&self, gpu: &CudaGpu, chip: Chip, dtype: DType, members: &[LowRankMember]) -> Result<Option<Arc<Built>>> {
        let sizes: Vec<_> = members.iter().map(|member| (member.outputs.len(), member.ranks.len())).collect();
        let Some(plan) = Plan::of(chip, &sizes) else { return Ok(None) };
        let key = (dtype, plan);
        if let Some(built) = self.built.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Some(built.clone()));
        }
        let options = plan.options(if dtype == DType::BF16 { "BF16" } else { "F16" });
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let module = gpu.compile("low_rank.cu", TEXT, &options)?;
        let outputs = module.load_function("low_rank_outputs").w()?;
        let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        outputs.set_attribute(shared, number(gpu, plan.bytes())?).w()?;
        let built = Arc::new(Built { plan, outputs, sums: module.load_function("low_rank_sums").w()? });
        self.built.write().unwrap_or_else(PoisonError::into_inner).insert(key, built.clone());
        Ok(Some(built))
    }
}

/// Asks for a kernel's work behind all that was asked for before.
///
/// # Safety
/// The kernel takes `params` and nothing else, and what they point to is there; see `CudaGpu::address`.
unsafe fn launch(
    gpu: &CudaGpu,
    function: &CudaFunction,
    grid: [usize; 2],
    shared: usize,
    params: &Backward,
) -> Result<()> {
    let [x, y] = grid.map(|n| number(gpu, n).map(i32::unsigned_abs));
    let (threads, shared) = (number(gpu, THREADS)?.unsigned_abs(), number(gpu, shared)?.unsigned_abs());
    let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
    gpu.context.bind_to_thread().w()?;
    let (groups, stream) = ((x?, y?, 1), gpu.stream.cu_stream());
    // SAFETY: the caller vouches for the parameters, which the driver has copied when it returns.
    let launched = unsafe {
        result::launch_kernel(function.cu_function(), groups, (threads, 1, 1), shared, stream, &mut arguments)
    };
    Ok(launched.w()?)
}

/// A number as the kernels take it.
fn number(gpu: &CudaGpu, n: usize) -> Result<i32> {
    i32::try_from(n)
        .map_err(|_| Error::Device { device: gpu.name(), reason: format!("low-rank products over {n} are too large") })
}

#[cfg(test)]
mod tests {
    use super::{super::nvrtc::takes, *};

    #[test]
    fn the_kernels_compile() -> Result<()> {
        let chip = Chip { processors: 132, shared: 232_448 };
        let members: [&[_]; 3] = [&[(4096, 16); 3], &[(1024, 16)], &[(1024, 32)]];
        for plan in members.into_iter().filter_map(|members| Plan::of(chip, members)) {
            for dtype in ["BF16", "F16"] {
                let options = plan.options(dtype);
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                for capability in [90, 120] {
                    takes("low_rank.cu", TEXT, &options, capability)?;
                }
            }
        }
        Ok(())
    }
}
