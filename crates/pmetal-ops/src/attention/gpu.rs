//! Attention on a GPU: on its matrix units where it has a kernel for the dtype and the head's width, else by the plain kernels.

use candle_core::{DType, Tensor};
use pmetal_metal::{AttentionRows, Gpu, Grid, Statistics, empty, kernels, limits, pitch, pitches};

use super::{AttentionSpec, Reach, Rows};
use crate::{
    Error, Result,
    place::is_off,
    rows::{GradPlace, empty_rows},
};

/// Operation whose switching off leaves the matrix units out.
const MATRIX: &str = "attention_matrix";

/// The widest head: that of the plain kernels.
pub(super) const MAX_WIDTH: usize = 256;

/// Threads of the plain kernels' threadgroups, and how many of these keep a large GPU busy.
const THREADS: usize = 128;
const ENOUGH_GROUPS: usize = 512;

/// Keys of a row from which few queries share them between several threadgroups.
const SPLIT_FROM: usize = 512;

/// Whether a tensor's rows begin where kernels read and write several elements at a time.
fn is_aligned(tensor: &Tensor) -> bool {
    let start = tensor.storage_and_layout().1.start_offset();
    pitch(tensor).is_some_and(|pitch| pitch.is_multiple_of(8) && start.is_multiple_of(8))
}

/// The tensor, or a contiguous copy where kernels cannot read it as it lies.
pub(super) fn readable(tensor: &Tensor) -> Result<Tensor> {
    Ok(if is_aligned(tensor) { tensor.clone() } else { tensor.contiguous()? })
}

/// The result `[tokens, heads * head_dim]` with what is free behind each row, and what backward needs: of the matrix units a vector, of
/// the plain kernels the log-sum-exp `[tokens, heads]`; where there are `sinks` (f32) also their shares of each query's softmax, `[tokens,
/// heads]`.
#[allow(clippy::too_many_arguments, reason = "what the formula needs")]
pub(super) fn forward(
    gpu: &dyn Gpu,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sinks: Option<&Tensor>,
    rows: &Rows,
    spec: &AttentionSpec,
    spare: usize,
) -> Result<Vec<Tensor>> {
    let (device, rows) = (q.device(), rows.on(q.device())?);
    let (tokens, width) = q.dims2()?;
    let room = empty_rows(tokens, width, spare, q.dtype(), device)?;
    let out = room.rows;
    if !is_off(MATRIX)
        && rows.max_q_len > 1
        && (is_aligned(&out) || out.is_contiguous())
        && let Some(stats) = gpu.attention_forward(q, k, v, &out, &rows, spec)?
    {
        let shares = sinks.map(|sinks| sink(gpu, sinks, &out, &stats, spec)).transpose()?;
        let (Statistics::Natural(stats) | Statistics::Binary(stats)) = stats;
        return Ok([room.parent, stats.flatten_all()?].into_iter().chain(shares).collect());
    }
    let lse = empty((tokens, spec.heads), DType::F32, device)?;
    let grid = Grid { groups: [rows.max_q_len, spec.heads, rows.rows], threads: THREADS };
    let splits = splits(&rows, spec);
    if splits > 1 {
        split(gpu, [q, k, v], &out, &lse, &rows, spec, splits)?;
    } else {
        let params = params_of([q, k, v, &out], None, spec)?;
        kernels::attention_plain(gpu, q.dtype(), grid, q, k, v, &rows.table, &out, &lse, params)?;
    }
    let stats = Statistics::Natural(lse.clone());
    let shares = sinks.map(|sinks| sink(gpu, sinks, &out, &stats, spec)).transpose()?;
    Ok([room.parent, lse].into_iter().chain(shares).collect())
}

/// Takes results and statistics to those with sinks in the softmax, and returns the shares that these have.
fn sink(gpu: &dyn Gpu, sinks: &Tensor, out: &Tensor, stats: &Statistics, spec: &AttentionSpec) -> Result<Tensor> {
    let (tokens, heads) = (out.dim(0)?, spec.heads);
    let (stats, unit, [token_step, head_step]) = match stats {
        Statistics::Natural(lse) => (lse, 1.0, [heads, 1]),
        Statistics::Binary(lse) => (lse, std::f32::consts::LN_2, [1, tokens]),
    };
    let shares = empty((tokens, heads), DType::F32, out.device())?;
    let [out_pitch] = pitches([out])?;
    let params = kernels::SinkParams {
        places: (tokens * heads) as u32,
        heads: heads as u32,
        d: spec.head_dim as u32,
        out_pitch,
        token_step: token_step as u32,
        head_step: head_step as u32,
        unit,
    };
    let grid = Grid::line((tokens * heads).div_ceil(8), 256);
    kernels::attention_sinks(gpu, out.dtype(), grid, sinks, out, stats, &shares, params)?;
    Ok(shares)
}

/// The gradient of the sinks, f32, from the shares that [`forward`] returned.
pub(super) fn backward_of_sinks(
    gpu: &dyn Gpu,
    dout: &Tensor,
    out: &Tensor,
    shares: &Tensor,
    spec: &AttentionSpec,
) -> Result<Tensor> {
    const PART: usize = 256;
    let (tokens, heads) = shares.dims2()?;
    let parts = tokens.div_ceil(PART);
    let partial = empty((parts, heads), DType::F32, out.device())?;
    let [dout_pitch, out_pitch] = pitches([dout, out])?;
    let params = kernels::SinkGradientParams {
        tokens: tokens as u32,
        part: PART as u32,
        heads: heads as u32,
        d: spec.head_dim as u32,
        dout_pitch,
        out_pitch,
    };
    let grid = Grid { groups: [parts, heads, 1], threads: 256 };
    kernels::attention_sinks_gradient(gpu, out.dtype(), grid, dout, out, shares, &partial, params)?;
    Ok(partial.sum(0)?)
}

/// Of `[q, k, v, out]`, and in the backward `[dout, dq, dk, dv]`.
fn params_of(
    forward: [&Tensor; 4],
    backward: Option<[&Tensor; 4]>,
    spec: &AttentionSpec,
) -> Result<kernels::AttentionParams> {
    let [q_pitch, k_pitch, v_pitch, out_pitch] = pitches(forward)?;
    let [dout_pitch, dq_pitch, dk_pitch, dv_pitch] = backward.map_or(Ok([0; 4]), pitches)?;
    let [window, chunk] = limits(spec.reach);
    Ok(kernels::AttentionParams {
        heads: spec.heads as u32,
        kv_heads: spec.kv_heads as u32,
        d: spec.head_dim as u32,
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

/// Parts of the keys, so that decoding a long row keeps a GPU busy.
fn splits(rows: &AttentionRows, spec: &AttentionSpec) -> usize {
    let groups = rows.max_q_len * spec.heads * rows.rows;
    let keys = match spec.reach {
        Reach::All => rows.max_kv_len,
        Reach::Window(keys) | Reach::Chunk(keys) => rows.max_kv_len.min(keys),
    };
    if keys < SPLIT_FROM || groups == 0 {
        return 1;
    }
    ENOUGH_GROUPS.div_ceil(groups).clamp(1, keys / 128)
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
    let (tokens, heads, d) = (q.dim(0)?, spec.heads, spec.head_dim);
    let ([q_pitch, k_pitch, v_pitch, out_pitch], [window, chunk]) = (pitches([q, k, v, out])?, limits(spec.reach));
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
        window,
        chunk,
        cap: spec.softcap.unwrap_or_default(),
        q_pitch,
        k_pitch,
        v_pitch,
    };
    kernels::attention_plain_split(gpu, q.dtype(), grid, q, k, v, &rows.table, &partial, &partial_lse, params)?;
    let places = (tokens * heads) as u32;
    let params = kernels::MergeParams { places, heads: heads as u32, d: d as u32, splits: splits as u32, out_pitch };
    let grid = Grid::line(tokens * heads, 128);
    Ok(kernels::attention_plain_merge(gpu, q.dtype(), grid, &partial, &partial_lse, out, lse, params)?)
}

/// The gradients of q, k and v, each where `places` say.
#[allow(clippy::too_many_arguments, reason = "what the formula needs")]
pub(super) fn backward(
    gpu: &dyn Gpu,
    dout: &Tensor,
    [q, k, v]: [&Tensor; 3],
    out: &Tensor,
    stats: &Tensor,
    places: &[GradPlace; 3],
    rows: &Rows,
    spec: &AttentionSpec,
) -> Result<[Tensor; 3]> {
    let (dtype, device, rows) = (q.dtype(), q.device(), rows.on(q.device())?);
    let on_matrices = stats.rank() == 1;
    let fresh = |t: &Tensor, place: &GradPlace| {
        let placed = place.empty(t.dims2()?, dtype, device)?;
        let fits = !on_matrices || is_aligned(&placed) || placed.is_contiguous();
        Ok::<_, Error>(if fits { placed } else { empty(t.shape(), dtype, device)? })
    };
    // keys that no row reads, as in a cache, get no gradient
    let of_keys = |t: &Tensor, place| if rows.packed { fresh(t, place) } else { Ok(t.zeros_like()?) };
    let (dq, dk, dv) = (fresh(q, &places[0])?, of_keys(k, &places[1])?, of_keys(v, &places[2])?);
    if on_matrices {
        gpu.attention_backward(dout, [q, k, v], out, stats, [&dq, &dk, &dv], &rows, spec)?;
        return Ok([dq, dk, dv]);
    }
    let params = params_of([q, k, v, out], Some([dout, &dq, &dk, &dv]), spec)?;
    let delta = empty(stats.shape(), DType::F32, device)?;
    let grid = Grid { groups: [rows.max_q_len, spec.heads, rows.rows], threads: THREADS };
    kernels::attention_plain_dq(gpu, dtype, grid, dout, q, k, v, out, stats, &rows.table, &dq, &delta, params)?;
    let grid = Grid { groups: [rows.max_kv_len, spec.kv_heads, rows.rows], threads: THREADS };
    kernels::attention_plain_dkv(gpu, dtype, grid, dout, q, k, v, stats, &delta, &rows.table, &dk, &dv, params)?;
    Ok([dq, dk, dv])
}
