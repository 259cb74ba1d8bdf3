//! Attention on a GPU: on its matrix units where it has a kernel for the dtype and the head's width, else by the plain kernels.

use candle_core::{DType, Tensor};
use pmetal_metal::{AttentionRows, Gpu, Grid, empty, kernels};

use super::{AttentionSpec, OP, Rows};
use crate::{Error, Result, place::is_off};

/// Operation whose switching off leaves the matrix units out.
const MATRIX: &str = "attention_matrix";

/// The widest head of the plain kernels.
const MAX_WIDTH: usize = 256;

/// Threads of the plain kernels' threadgroups, and how many of these keep a large GPU busy.
const THREADS: usize = 128;
const ENOUGH_GROUPS: usize = 512;

/// Keys of a row from which few queries share them between several threadgroups.
const SPLIT_FROM: usize = 512;

/// The result, and what backward needs: of the matrix units a vector, of the plain kernels the log-sum-exp `[tokens, heads]`.
pub(super) fn forward(
    gpu: &dyn Gpu,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rows: &Rows,
    spec: &AttentionSpec,
) -> Result<Vec<Tensor>> {
    let (device, rows) = (q.device(), rows.on(q.device())?);
    let out = empty(q.shape(), q.dtype(), device)?;
    if !is_off(MATRIX)
        && rows.max_q_len > 1
        && let Some(stats) = gpu.attention_forward(q, k, v, &out, &rows, spec)?
    {
        return Ok(vec![out, stats.flatten_all()?]);
    }
    if spec.head_dim > MAX_WIDTH {
        return Err(Error::operand(OP, "head_dim", format!("at most {MAX_WIDTH}"), spec.head_dim));
    }
    let lse = empty((q.dim(0)?, spec.heads), DType::F32, device)?;
    let grid = Grid { groups: [rows.max_q_len, spec.heads, rows.rows], threads: THREADS };
    let splits = splits(&rows, spec);
    if splits > 1 {
        split(gpu, [q, k, v], &out, &lse, &rows, spec, splits)?;
    } else {
        kernels::attention_plain(gpu, q.dtype(), grid, q, k, v, &rows.table, &out, &lse, params_of(spec))?;
    }
    Ok(vec![out, lse])
}

fn params_of(spec: &AttentionSpec) -> kernels::AttentionParams {
    let AttentionSpec { heads, kv_heads, head_dim, scale } = *spec;
    kernels::AttentionParams { heads: heads as u32, kv_heads: kv_heads as u32, d: head_dim as u32, scale }
}

/// Parts of the keys, so that decoding a long row keeps a GPU busy.
fn splits(rows: &AttentionRows, spec: &AttentionSpec) -> usize {
    let groups = rows.max_q_len * spec.heads * rows.rows;
    if rows.max_kv_len < SPLIT_FROM || groups == 0 {
        return 1;
    }
    ENOUGH_GROUPS.div_ceil(groups).clamp(1, rows.max_kv_len / 128)
}

fn split(
    gpu: &dyn Gpu,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    lse: &Tensor,
    rows: &AttentionRows,
    spec: &AttentionSpec,
    splits: usize,
) -> Result<()> {
    let (tokens, heads, d) = q.dims3()?;
    let partial = empty((splits, tokens, heads, d), DType::F32, q.device())?;
    let partial_lse = empty((splits, tokens, heads), DType::F32, q.device())?;
    let grid = Grid { groups: [rows.max_q_len * splits, heads, rows.rows], threads: THREADS };
    let params = kernels::SplitParams {
        tokens: tokens as u32,
        splits: splits as u32,
        heads: heads as u32,
        kv_heads: spec.kv_heads as u32,
        d: d as u32,
        scale: spec.scale,
    };
    kernels::attention_plain_split(gpu, q.dtype(), grid, q, k, v, &rows.table, &partial, &partial_lse, params)?;
    let params = kernels::MergeParams { places: (tokens * heads) as u32, d: d as u32, splits: splits as u32 };
    let grid = Grid::line(tokens * heads, 128);
    Ok(kernels::attention_plain_merge(gpu, q.dtype(), grid, &partial, &partial_lse, out, lse, params)?)
}

/// The gradients of q, k and v.
pub(super) fn backward(
    gpu: &dyn Gpu,
    dout: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    stats: &Tensor,
    rows: &Rows,
    spec: &AttentionSpec,
) -> Result<[Tensor; 3]> {
    let (dtype, device, rows) = (q.dtype(), q.device(), rows.on(q.device())?);
    // keys that no row reads, as in a cache, get no gradient
    let like =
        |t: &Tensor| if rows.packed { Ok(empty(t.shape(), dtype, device)?) } else { Ok::<_, Error>(t.zeros_like()?) };
    let (dq, dk, dv) = (empty(q.shape(), dtype, device)?, like(k)?, like(v)?);
    if stats.rank() == 1 {
        gpu.attention_backward(dout, [q, k, v], out, stats, [&dq, &dk, &dv], &rows, spec)?;
        return Ok([dq, dk, dv]);
    }
    let params = params_of(spec);
    let delta = empty(stats.shape(), DType::F32, device)?;
    let grid = Grid { groups: [rows.max_q_len, spec.heads, rows.rows], threads: THREADS };
    kernels::attention_plain_dq(gpu, dtype, grid, dout, q, k, v, out, stats, &rows.table, &dq, &delta, params)?;
    let grid = Grid { groups: [rows.max_kv_len, spec.kv_heads, rows.rows], threads: THREADS };
    kernels::attention_plain_dkv(gpu, dtype, grid, dout, q, k, v, stats, &delta, &rows.table, &dk, &dv, params)?;
    Ok([dq, dk, dv])
}
