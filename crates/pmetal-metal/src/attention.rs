//! Attention on matrices of 8 x 8: how `kernels/attention.metal` is launched, on Metal and in the emulator.

use candle_core::{DType, Tensor};

use crate::{AttentionRows, AttentionSpec, Error, Gpu, Grid, Result, empty, kernels};

/// Queries, and in the backward keys, of a threadgroup.
const TILE: usize = 32;

/// Fills `out` and returns the log-sum-exp of each query `[tokens, heads]` in f32, as [`Gpu::attention_forward`] says.
///
/// None where a head's width is not a multiple of 8 or exceeds 128, or where the dtype is none of f32, f16 and bf16.
///
/// # Errors
/// When a buffer does not fit, or the launch fails.
pub fn attention_forward(
    gpu: &dyn Gpu,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    rows: &AttentionRows,
    spec: &AttentionSpec,
) -> Result<Option<Tensor>> {
    let width = spec.head_dim;
    if !width.is_multiple_of(8) || width > 128 || !matches!(q.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Ok(None);
    }
    let lse = empty((q.dim(0)?, spec.heads), DType::F32, q.device())?;
    let grid = Grid { groups: [rows.max_q_len.div_ceil(TILE), spec.heads, rows.rows], threads: 128 };
    let (heads, kv_heads, width) = (spec.heads as u32, spec.kv_heads as u32, width as u32);
    let (dtype, table, scale) = (q.dtype(), &rows.table, spec.scale);
    let params = kernels::MatrixAttentionParams { heads, kv_heads, width, scale };
    let kernel = if width <= 64 { kernels::attention_forward_64 } else { kernels::attention_forward_128 };
    kernel(gpu, dtype, grid, q, k, v, table, out, &lse, params)?;
    Ok(Some(lse))
}

/// The backward of [`attention_forward`], which returned `lse`: fills `[dq, dk, dv]`; of the last two only what rows hold.
///
/// # Errors
/// As for [`attention_forward`].
#[allow(clippy::too_many_arguments, reason = "what the formula needs")]
pub fn attention_backward(
    gpu: &dyn Gpu,
    dout: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    [dq, dk, dv]: [&Tensor; 3],
    rows: &AttentionRows,
    spec: &AttentionSpec,
) -> Result<()> {
    let dtype = q.dtype();
    let (heads, kv_heads, width) = (spec.heads as u32, spec.kv_heads as u32, spec.head_dim as u32);
    let delta = empty(lse.shape(), DType::F32, q.device())?;
    let count = u32::try_from(lse.elem_count()).map_err(|_| too_many(lse))?;
    let params = kernels::DeltaParams { n: count, width };
    let grid = Grid::line(lse.elem_count().div_ceil(8), 256);
    kernels::attention_delta(gpu, dtype, grid, out, dout, &delta, params)?;

    let (table, scale) = (&rows.table, spec.scale);
    let queries = Grid { groups: [rows.max_q_len.div_ceil(TILE), spec.heads, rows.rows], threads: 128 };
    let keys = Grid { groups: [rows.max_kv_len.div_ceil(TILE), spec.kv_heads, rows.rows], threads: 256 };
    let params = kernels::MatrixAttentionParams { heads, kv_heads, width, scale };
    let dq_kernel = if width <= 64 { kernels::attention_dq_64 } else { kernels::attention_dq_128 };
    dq_kernel(gpu, dtype, queries, dout, q, k, v, lse, &delta, table, dq, params)?;
    let dkv_kernel = if width <= 64 { kernels::attention_dkv_64 } else { kernels::attention_dkv_128 };
    dkv_kernel(gpu, dtype, keys, dout, q, k, v, lse, &delta, table, dk, dv, params)
}

fn too_many(lse: &Tensor) -> Error {
    Error::Buffer {
        kernel: kernels::ATTENTION_DELTA.name,
        buffer: "delta",
        expected: "at most 4,294,967,295 elements".into(),
        got: format!("{} elements", lse.elem_count()),
    }
}
