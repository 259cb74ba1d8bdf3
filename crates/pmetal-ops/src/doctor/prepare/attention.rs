//! Attention: packed rows, rows in a cache, new tokens, over all keys, windows and chunks.

use super::{SPARE, prepared};
use crate::{
    AttentionSpec, Reach, Result, Rows, Value, attention,
    doctor::checks::{Prepared, Run, Size},
};

/// Two query heads share a key head.
fn attention_spec(rows: usize, width: usize) -> AttentionSpec {
    let heads = if rows < 1024 { 2 } else { 16 };
    let scale = 1.0 / (width as f32).sqrt();
    AttentionSpec { heads, kv_heads: heads / 2, head_dim: width, scale, reach: Reach::All, softcap: None }
}

fn attend(run: &Run, rows: Rows, [queries, keys]: [usize; 2], spec: AttentionSpec) -> Result<Prepared> {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = spec;
    let (q, kv) = ([queries, heads * head_dim], [keys, kv_heads * head_dim]);
    let leaves = [run.columns(q, 1)?, run.columns(kv, 2)?, run.columns(kv, 3)?].map(Value::variable);
    prepared(leaves.into(), move |v| Ok(vec![attention(&v[0], &v[1], &v[2], v.get(3), &rows, spec, SPARE)?]))
}

/// [`attend`] with a sink for each head.
fn attend_with_sinks(run: &Run, rows: Rows, tokens: [usize; 2], spec: AttentionSpec) -> Result<Prepared> {
    let Prepared { mut leaves, arena, forward } = attend(run, rows, tokens, spec)?;
    leaves.push(Value::variable(run.tensor(&[spec.heads], 4)?));
    Ok(Prepared { leaves, arena, forward })
}

/// Rows of different lengths behind one another, one of them a single token.
pub(in crate::doctor) fn packed(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let first = rows / 5;
    let lengths = Rows::packed(&[first, 1, rows - first - 1]);
    attend(run, lengths, [rows, rows], attention_spec(rows, width))
}

/// Windows, a cap on scores and sinks, in packed rows.
pub(in crate::doctor) fn windowed(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let spec = AttentionSpec { reach: Reach::Window(rows / 3), softcap: Some(0.5), ..attention_spec(rows, width) };
    attend_with_sinks(run, Rows::packed(&[rows - 3, 3]), [rows, rows], spec)
}

/// Chunks and sinks, in rows that go on from what a cache holds.
pub(in crate::doctor) fn chunked(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let spec = AttentionSpec { reach: Reach::Chunk(rows / 2 - 1), ..attention_spec(rows, width) };
    let queries = [rows / 2, 1];
    let lengths = Rows::cached(&queries, &[rows, rows / 3], rows + 2);
    attend_with_sinks(run, lengths, [queries.iter().sum(), 2 * (rows + 2)], spec)
}

/// Two rows of nearly one length.
pub(in crate::doctor) fn long(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let tokens = 2 * rows - 1;
    attend(run, Rows::packed(&[rows, rows - 1]), [tokens, tokens], attention_spec(rows, width))
}

/// The same over windows that leave tiles of keys out.
pub(in crate::doctor) fn long_windowed(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let spec = AttentionSpec { reach: Reach::Window(rows / 3), ..attention_spec(rows, width) };
    let tokens = 2 * rows - 1;
    attend(run, Rows::packed(&[rows, rows - 1]), [tokens, tokens], spec)
}

/// Rows that go on from what a cache holds.
pub(in crate::doctor) fn cached(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let queries = [rows / 4, 1, rows / 3];
    let lengths = Rows::cached(&queries, &[rows, rows / 2, rows / 3], rows + 2);
    attend(run, lengths, [queries.iter().sum(), 3 * (rows + 2)], attention_spec(rows, width))
}

/// One new token a row, as in generation: without gradients.
pub(in crate::doctor) fn decoding(run: &Run, size: Size) -> Result<Prepared> {
    decode(run, size, attention_spec(size.rows, size.width))
}

/// The same over a window, with a cap on scores.
pub(in crate::doctor) fn windowed_decoding(run: &Run, size: Size) -> Result<Prepared> {
    let reach = Reach::Window(size.rows - 5);
    decode(run, size, AttentionSpec { reach, softcap: Some(0.5), ..attention_spec(size.rows, size.width) })
}

fn decode(run: &Run, Size { rows, width }: Size, spec: AttentionSpec) -> Result<Prepared> {
    let lengths = Rows::cached(&[1, 1], &[rows, rows / 3], rows);
    let kv = |seed| Ok::<_, crate::Error>(Value::constant(run.tensor(&[2 * rows, spec.kv_heads * width], seed)?));
    let (q, k, v) = (Value::constant(run.tensor(&[2, spec.heads * width], 1)?), kv(2)?, kv(3)?);
    prepared(vec![], move |_| Ok(vec![attention(&q, &k, &v, None, &lengths, spec, 0)?]))
}
