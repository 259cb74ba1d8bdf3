//! What the kernels of `low_rank.cu` read and write, in their words.

use std::ffi::c_void;

use candle_core::{
    DType, Tensor,
    cuda_backend::{WrapErr, cudarc::driver::sys},
};
use pmetal_metal::{LowRankBackward, LowRankMember, Result, pitch};

use super::{
    super::CudaGpu,
    FEWEST_TOKENS, number,
    plan::{MEMBERS, Plan},
};

/// A matrix of 16-bit numbers whose rows begin at multiples of 16 bytes.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) at: sys::CUdeviceptr,
    rows: usize,
    width: usize,
    pub(super) pitch: usize,
    dtype: DType,
}

impl Rows {
    /// None where the tensor is no such.
    pub(super) fn of(gpu: &CudaGpu, tensor: &Tensor) -> Result<Option<Self>> {
        let Some(pitch) = pitch(tensor) else { return Ok(None) };
        let ((rows, width), at, dtype) = (tensor.dims2()?, gpu.address(tensor)?, tensor.dtype());
        let fits = pitch.is_multiple_of(8) && at.is_multiple_of(16) && rows > 0 && width > 0;
        Ok((fits && matches!(dtype, DType::BF16 | DType::F16)).then_some(Self { at, rows, width, pitch, dtype }))
    }

    /// What the device's copies need to know of the matrix as panels of `width` columns, 64 or 16, of which a copy takes `rows` rows of
    /// `panels`.
    pub(super) fn map(self, width: usize, rows: usize, panels: usize) -> Result<Map> {
        use sys::{
            CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
            CUtensorMapSwizzle,
        };
        let mut map = Map(sys::CUtensorMap { opaque: [0; 16] });
        let dims = [width as u64, self.rows as u64, (self.width / width) as u64];
        let strides = [2 * self.pitch as u64, 2 * width as u64];
        let (box_dims, steps) = ([width as u32, rows as u32, panels as u32], [1, 1, 1]);
        let element = match self.dtype {
            DType::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let swizzle = match width {
            64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        };
        // SAFETY: it reads as many numbers as the panels have dimensions, one stride less, and writes the map.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map.0,
                element,
                3,
                self.at as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().w()?;
        Ok(map)
    }
}

/// Tokens, where the operands agree and are of a form that the kernels take.
pub(super) fn tokens_of(work: &LowRankBackward) -> Result<Option<usize>> {
    let ((tokens, outputs), (b_outputs, ranks)) = (work.dy.dims2()?, work.b.dims2()?);
    let agree = b_outputs == outputs
        && [work.u, work.du].iter().all(|tensor| tensor.dims() == [tokens, ranks])
        && [work.b, work.u, work.du].iter().all(|tensor| tensor.dtype() == work.dy.dtype());
    let pieces = |range: &std::ops::Range<usize>, size: usize, end: usize| {
        range.start.is_multiple_of(size) && range.len().is_multiple_of(size) && !range.is_empty() && range.end <= end
    };
    let members = work.members.iter().all(|LowRankMember { outputs: own, ranks: own_ranks, .. }| {
        pieces(own, 64, outputs) && pieces(own_ranks, 16, ranks)
    });
    let whole = outputs.is_multiple_of(64) && ranks.is_multiple_of(16);
    Ok((agree && members && whole && tokens >= FEWEST_TOKENS).then_some(tokens))
}

/// The members as the kernels take them.
pub(super) struct Members {
    pub(super) member: [Member; MEMBERS],
    pub(super) count: usize,
    pub(super) slices: usize,
}

impl Members {
    /// None where they are too many, or a `B` is not trained.
    pub(super) fn of(gpu: &CudaGpu, work: &LowRankBackward, plan: &Plan) -> Result<Option<Self>> {
        let mut all = Self { member: [Member::default(); MEMBERS], count: 0, slices: 0 };
        for LowRankMember { outputs, ranks, scale, db, .. } in work.members {
            let Some((db, fresh)) = db else { return Ok(None) };
            let (rows, used) = db.dims2()?;
            let fits = rows == outputs.len() && used <= ranks.len();
            if !fits || db.dtype() != DType::F32 || !db.is_contiguous() {
                return Ok(None);
            }
            let Some(member) = all.member.get_mut(all.count) else { return Ok(None) };
            let slices = outputs.len().div_ceil(plan.columns);
            *member = Member {
                output: number(gpu, outputs.start)?,
                outputs: number(gpu, outputs.len())?,
                slice: number(gpu, all.slices)?,
                slices: number(gpu, slices)?,
                rank: number(gpu, ranks.start)?,
                used: number(gpu, used)?,
                scale: *scale,
                fresh: i32::from(*fresh),
                db: gpu.address(db)?,
            };
            all.count += 1;
            all.slices += slices;
        }
        Ok((all.count > 0).then_some(all))
    }
}

/// `Map` of the text: a matrix as the device's copies know it.
#[repr(C, align(64))]
pub(super) struct Map(sys::CUtensorMap);

/// `Member` of the text.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Member {
    output: i32,
    outputs: i32,
    slice: i32,
    slices: i32,
    rank: i32,
    used: i32,
    scale: f32,
    fresh: i32,
    db: u64,
}

/// `Backward` of the text.
#[repr(C)]
pub(super) struct Backward {
    pub(super) dy: Map,
    pub(super) b: Map,
    pub(super) u: Map,
    pub(super) du: u64,
    pub(super) du_pitch: i32,
    pub(super) tokens: i32,
    pub(super) members: i32,
    pub(super) slices: i32,
    pub(super) rows: i32,
    pub(super) splits: i32,
    pub(super) du_parts: u64,
    pub(super) db_parts: u64,
    pub(super) member: [Member; MEMBERS],
}
