//! `attention.metal`, attention on Metal's matrix units, against attention in f64.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{AttentionRows, AttentionSpec, Reach, attention_backward, attention_forward, empty};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// Numbers that look random, of about one.
fn random(tokens: usize, heads: usize, d: usize, seed: u64, dtype: DType) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = std::iter::repeat_with(next).take(tokens * heads * d).collect();
    let tensor = Tensor::from_vec(values, (tokens, heads * d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    pitched(&tensor, 8 * seed as usize)
}

/// The tensor as columns of a wider one, with `spare` columns around it.
fn pitched(tensor: &Tensor, spare: usize) -> Tensor {
    let (rows, width) = tensor.dims2().unwrap();
    let parent = empty((rows, width + spare + 16), tensor.dtype(), &Device::Cpu).unwrap();
    let fill = tensor.zeros_like().unwrap().narrow(1, 0, 1).unwrap();
    let [before, behind] = [16, spare].map(|columns| fill.broadcast_as((rows, columns)).unwrap().affine(1.0, 9.0));
    let all = Tensor::cat(&[before.unwrap(), tensor.clone(), behind.unwrap()], 1).unwrap();
    parent.slice_set(&all.contiguous().unwrap(), 0, 0).unwrap();
    parent.narrow(1, 16, width).unwrap()
}

/// One head of a tensor as rows in f64.
fn head(t: &Tensor, head: usize, d: usize) -> Vec<Vec<f64>> {
    t.narrow(1, head * d, d).unwrap().to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

/// `[out, dq, dk, dv]`, each a list of heads.
fn expected(inputs: &[Tensor; 4], rows: &[[usize; 4]], spec: &AttentionSpec) -> [Vec<Vec<Vec<f64>>>; 4] {
    let [q, k, v, dout] = inputs;
    let (d, scale, cap) = (spec.head_dim, f64::from(spec.scale), spec.softcap.map(f64::from));
    let capped = |score: f64| cap.map_or(score, |cap| cap * (score / cap).tanh());
    // of the score by its uncapped self
    let slope_of = |score: f64| cap.map_or(1.0, |cap| 1.0 - (score / cap).tanh().powi(2));
    let zeros = |t: &Tensor, heads: usize| vec![vec![vec![0.0; d]; t.dims()[0]]; heads];
    let mut all = [zeros(q, HEADS), zeros(q, HEADS), zeros(k, KV_HEADS), zeros(k, KV_HEADS)];
    for h in 0..HEADS {
        let kv = h * KV_HEADS / HEADS;
        let (q, k, v, dout) = (head(q, h, d), head(k, kv, d), head(v, kv, d), head(dout, h, d));
        let [outs, dqs, dks, dvs] = &mut all;
        for &[q_start, queries, kv_start, keys] in rows {
            for i in 0..queries {
                let (at, position) = (q_start + i, keys - queries + i);
                let seen = kv_start + spec.reach.first(position)..kv_start + position + 1;
                let scores: Vec<f64> = seen.clone().map(|j| scale * dot(&q[at], &k[j])).collect();
                let powers: Vec<f64> = scores.iter().map(|&score| capped(score).exp()).collect();
                let total: f64 = powers.iter().sum();
                seen.clone().zip(&powers).for_each(|(j, p)| add(&mut outs[h][at], p / total, &v[j]));
                let delta = dot(&outs[h][at], &dout[at]);
                for ((j, p), &score) in seen.zip(&powers).zip(&scores) {
                    let slope = slope_of(score) * scale * p / total * (dot(&dout[at], &v[j]) - delta);
                    add(&mut dqs[h][at], slope, &k[j]);
                    add(&mut dks[kv][j], slope, &q[at]);
                    add(&mut dvs[kv][j], p / total, &dout[at]);
                }
            }
        }
    }
    all
}

/// Runs forward and backward where queries see all keys up to their own, and compares; a row is its first query, queries, first key, keys.
fn check(rows: &[[usize; 4]], d: usize, dtype: DType) {
    check_variant(rows, d, dtype, Reach::All, None);
}

fn check_variant(rows: &[[usize; 4]], d: usize, dtype: DType, reach: Reach, softcap: Option<f32>) {
    let gpu = Emulator::new();
    let tokens = rows.iter().map(|row| row[1]).sum();
    let kv_tokens = rows.iter().map(|row| row[2] + row[3]).max().unwrap();
    let [q, dout] = [1, 2].map(|seed| random(tokens, HEADS, d, seed, dtype));
    let [k, v] = [3, 4].map(|seed| random(kv_tokens, KV_HEADS, d, seed, dtype));
    let (heads, kv_heads) = (HEADS, KV_HEADS);
    let spec = AttentionSpec { heads, kv_heads, head_dim: d, scale: 0.2, reach, softcap };
    let upload = |numbers: &[u32]| Tensor::from_slice(numbers, numbers.len(), &Device::Cpu);
    let rows_of = AttentionRows::new::<candle_core::Error>(rows, upload).unwrap();
    let zeros = |like: &Tensor, spare| pitched(&like.zeros_like().unwrap().contiguous().unwrap(), spare);
    let out = zeros(&q, 24);
    let (dq, dk, dv) = (zeros(&q, 0), zeros(&k, 40), zeros(&v, 48));
    let lse = attention_forward(&gpu, [&q, &k, &v], &out, &rows_of, &spec).unwrap().unwrap();
    attention_backward(&gpu, &dout, [&q, &k, &v], &out, &lse, [&dq, &dk, &dv], &rows_of, &spec).unwrap();

    // relative to the largest; a short dtype rounds the result, and out before delta is taken of it
    let tolerance = match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 1e-3,
        _ => 5e-3,
    };
    let want = expected(&[q, k, v, dout], rows, &spec);
    for (what, want, got) in [("out", &want[0], out), ("dq", &want[1], dq), ("dk", &want[2], dk), ("dv", &want[3], dv)]
    {
        let largest = want.iter().flatten().flatten().fold(0f64, |max, x| max.max(x.abs()));
        for (h, want) in want.iter().enumerate() {
            for (token, (want, got)) in want.iter().zip(head(&got, h, d)).enumerate() {
                for (column, (want, got)) in want.iter().zip(got).enumerate() {
                    let error = (want - got).abs() / largest;
                    assert!(
                        error <= tolerance,
                        "{what}[{token}, {h}, {column}] of {rows:?}, {spec:?}, {dtype:?}: {got}, expected {want}, error {error:e}"
                    );
                }
            }
        }
    }
}

/// Rows behind one another, whose queries and keys are the same tokens.
fn packed(lengths: &[usize]) -> Vec<[usize; 4]> {
    let starts = lengths.iter().scan(0, |next, &len| Some(std::mem::replace(next, *next + len)));
    starts.zip(lengths).map(|(start, &len)| [start, len, start, len]).collect()
}

#[test]
fn short_rows() {
    for d in [64, 80] {
        check(&packed(&[3, 1, 5]), d, DType::F32);
    }
    check(&packed(&[3, 1, 5]), 96, DType::F16);
}

#[test]
fn rows_longer_than_a_tile() {
    check(&packed(&[9, 33, 40]), 64, DType::F32);
}

#[test]
fn wide_heads_in_bf16() {
    check(&packed(&[33, 8]), 80, DType::BF16);
    check(&packed(&[17]), 128, DType::F32);
}

#[test]
fn queries_behind_keys_of_a_cache() {
    check(&[[0, 5, 0, 37], [5, 1, 40, 33], [6, 34, 80, 70]], 64, DType::BF16);
}

/// Windows and chunks shorter and longer than a tile of 16 or 32 keys, in rows shorter and longer than they.
#[test]
fn queries_that_see_some_of_the_keys() {
    for reach in [Reach::Window(2), Reach::Window(7), Reach::Window(40), Reach::Chunk(5), Reach::Chunk(33)] {
        check_variant(&packed(&[70, 3]), 8, DType::F32, reach, None);
        check_variant(&[[0, 5, 0, 37], [5, 1, 40, 66], [6, 34, 110, 70]], 24, DType::F32, reach, None);
    }
    check_variant(&packed(&[35, 80]), 64, DType::BF16, Reach::Window(20), None);
    check_variant(&packed(&[80]), 128, DType::F16, Reach::Chunk(48), None);
}

#[test]
fn scores_with_a_cap() {
    check_variant(&packed(&[35, 3]), 24, DType::F32, Reach::All, Some(0.4));
    check_variant(&packed(&[40, 3]), 80, DType::F32, Reach::Window(9), Some(3.0));
    check_variant(&[[0, 5, 0, 37], [5, 3, 40, 33]], 128, DType::BF16, Reach::Chunk(16), Some(0.5));
}
