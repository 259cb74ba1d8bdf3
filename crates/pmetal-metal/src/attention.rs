//! Attention on matrices of 8 x 8: how `kernels/attention.metal` is launched, on Metal and in the emulator.

use candle_core::{DType, Tensor};

use crate::{AttentionRows, AttentionSpec, Error, Gpu, Grid, Reach, Result, empty, kernels, pitch};

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
    let (dtype, table) = (q.dtype(), &rows.table);
    let params = params([q, k, v, out], None, spec)?;
    let kernel = match (spec.softcap, width) {
        (Some(_), _) => kernels::attention_forward_capped,
        (None, ..=64) => kernels::attention_forward_64,
        (None, _) => kernels::attention_forward_128,
    };
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
    let (dtype, width) = (q.dtype(), spec.head_dim);
    let params = params([q, k, v, out], Some([dout, dq, dk, dv]), spec)?;
    let delta = empty(lse.shape(), DType::F32, q.device())?;
    let grid = Grid::line(lse.elem_count().div_ceil(8), 256);
    let of_delta = kernels::DeltaParams {
        n: u32::try_from(lse.elem_count()).map_err(|_| too_many(lse))?,
        heads: params.heads,
        width: params.width,
        out_pitch: params.out_pitch,
        dout_pitch: params.dout_pitch,
    };
    kernels::attention_delta(gpu, dtype, grid, out, dout, &delta, of_delta)?;

    let table = &rows.table;
    let queries = Grid { groups: [rows.max_q_len.div_ceil(TILE), spec.heads, rows.rows], threads: 128 };
    let keys = Grid { groups: [rows.max_kv_len.div_ceil(TILE), spec.kv_heads, rows.rows], threads: 256 };
    let dq_kernel = match (spec.softcap, width) {
        (Some(_), _) => kernels::attention_dq_capped,
        (None, ..=64) => kernels::attention_dq_64,
        (None, _) => kernels::attention_dq_128,
    };
    dq_kernel(gpu, dtype, queries, dout, q, k, v, lse, &delta, table, dq, params)?;
    let dkv_kernel = match (spec.softcap, width) {
        (Some(_), _) => kernels::attention_dkv_capped,
        (None, ..=64) => kernels::attention_dkv_64,
        (None, _) => kernels::attention_dkv_128,
    };
    dkv_kernel(gpu, dtype, keys, dout, q, k, v, lse, &delta, table, dk, dv, params)
}

/// Of `[q, k, v, out]`, and in the backward `[dout, dq, dk, dv]`.
fn params(
    forward: [&Tensor; 4],
    backward: Option<[&Tensor; 4]>,
    spec: &AttentionSpec,
) -> Result<kernels::MatrixAttentionParams> {
    let [q_pitch, k_pitch, v_pitch, out_pitch] = pitches(forward)?;
    let [dout_pitch, dq_pitch, dk_pitch, dv_pitch] = backward.map_or(Ok([0; 4]), pitches)?;
    let [window, chunk] = limits(spec.reach);
    Ok(kernels::MatrixAttentionParams {
        heads: spec.heads as u32,
        kv_heads: spec.kv_heads as u32,
        width: spec.head_dim as u32,
        scale: spec.scale,
        window,
        chunk,
        cap: spec.softcap.unwrap_or_default(),
        q_pitch,
        k_pitch,
        v_pitch,
        out_pitch,
        dout_pitch,
        dq_pitch,
        dk_pitch,
        dv_pitch,
    })
}

/// How many of the keys up to its own a query sees at most, and how many a chunk has, as kernels take them: the greatest number of 31 bits
/// where there is no limit.
pub fn limits(reach: Reach) -> [u32; 2] {
    const NONE: u32 = i32::MAX as u32;
    let number = |keys: usize| u32::try_from(keys).unwrap_or(NONE).clamp(1, NONE);
    match reach {
        Reach::All => [NONE; 2],
        Reach::Window(keys) => [number(keys), NONE],
        Reach::Chunk(keys) => [NONE, number(keys)],
    }
}

/// The pitches of an attention's operands, as kernels take them: multiples of 4 where heads are.
///
/// # Errors
/// Where one has no contiguous rows.
pub fn pitches<const N: usize>(tensors: [&Tensor; N]) -> Result<[u32; N]> {
    let mut all = [0; N];
    for (to, tensor) in all.iter_mut().zip(tensors) {
        let found = pitch(tensor).and_then(|pitch| u32::try_from(pitch).ok());
        *to = found.ok_or_else(|| Error::Buffer {
            kernel: "attention",
            buffer: "an operand",
            expected: "two-dimensional, of contiguous rows".into(),
            got: format!("{:?} with strides {:?}", tensor.dims(), tensor.stride()),
        })?;
    }
    Ok(all)
}

fn too_many(lse: &Tensor) -> Error {
    Error::Buffer {
        kernel: kernels::ATTENTION_DELTA.name,
        buffer: "delta",
        expected: "at most 4,294,967,295 elements".into(),
        got: format!("{} elements", lse.elem_count()),
    }
}
