//! Attention and its gradient against plain f64 loops.

mod common;

use common::{assert_close, numbers, rounding, same_on_any_threads, wide};
use half::{bf16, f16};
use pmetal_cpu::{
    AttentionShape, Element, Reach, Segment, attention_backward, attention_forward, attention_sinks,
    attention_sinks_backward,
};

fn segment(q_start: usize, q_len: usize, kv_start: usize, kv_len: usize) -> Segment {
    Segment { q_start, q_len, kv_start, kv_len }
}

/// Results and gradients in f64.
struct Reference {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn reference(dout: &[f64], q: &[f64], k: &[f64], v: &[f64], segments: &[Segment], shape: &AttentionShape) -> Reference {
    let (h, d, group, scale) = (shape.heads, shape.head_dim, shape.heads / shape.kv_heads, f64::from(shape.scale));
    let zeros = |x: &[f64]| vec![0.0; x.len()];
    let mut r = Reference { out: zeros(q), lse: vec![0.0; q.len() / d], dq: zeros(q), dk: zeros(k), dv: zeros(v) };
    for s in segments {
        for (i, head) in (0..s.q_len).flat_map(|i| (0..h).map(move |head| (i, head))) {
            let at = ((s.q_start + i) * h + head) * d;
            let kv = |j: usize| ((s.kv_start + j) * shape.kv_heads + head / group) * d;
            let dot = |x: &[f64], a: usize, y: &[f64], b: usize| (0..d).map(|e| x[a + e] * y[b + e]).sum::<f64>();
            let own = s.kv_len - s.q_len + i;
            let first = match shape.reach {
                Reach::All => 0,
                Reach::Window(n) => own.saturating_sub(n - 1),
                Reach::Chunk(n) => own - own % n,
            };
            let kv = |j: usize| kv(first + j);
            let scores: Vec<f64> = (0..=own - first).map(|j| scale * dot(q, at, k, kv(j))).collect();
            let cap = shape.softcap.map(f64::from);
            let slopes: Vec<f64> =
                scores.iter().map(|x| cap.map_or(1.0, |cap| 1.0 - (x / cap).tanh().powi(2))).collect();
            let scores: Vec<f64> = scores.iter().map(|x| cap.map_or(*x, |cap| cap * (x / cap).tanh())).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + scores.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            r.lse[at / d] = lse;
            let p: Vec<f64> = scores.iter().map(|x| (x - lse).exp()).collect();
            for (j, p) in p.iter().enumerate() {
                (0..d).for_each(|e| r.out[at + e] += p * v[kv(j) + e]);
            }
            let delta: f64 = (0..d).map(|e| dout[at + e] * r.out[at + e]).sum();
            for (j, p) in p.iter().enumerate() {
                let ds = scale * slopes[j] * p * (dot(dout, at, v, kv(j)) - delta);
                for e in 0..d {
                    r.dq[at + e] += ds * k[kv(j) + e];
                    r.dk[kv(j) + e] += ds * q[at + e];
                    r.dv[kv(j) + e] += p * dout[at + e];
                }
            }
        }
    }
    r
}

fn plain(heads: usize, kv_heads: usize, head_dim: usize, scale: f32) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale, reach: Reach::All, softcap: None }
}

fn check<T: Element>(heads: usize, kv_heads: usize, head_dim: usize, segments: &[Segment], tokens: usize, kv: usize) {
    let shape = plain(heads, kv_heads, head_dim, 1.5 / (head_dim as f32).sqrt());
    check_shape::<T>(&shape, segments, tokens, kv);
}

fn check_shape<T: Element>(shape: &AttentionShape, segments: &[Segment], tokens: usize, kv: usize) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let (nq, nk) = (tokens * heads * head_dim, kv * kv_heads * head_dim);
    let (dout, q) = (numbers::<T>(nq, 1), numbers::<T>(nq, 2));
    let (k, v) = (numbers::<T>(nk, 3), numbers::<T>(nk, 4));
    let (mut out, mut lse) = (vec![T::ZERO; nq], vec![0.0; tokens * heads]);
    attention_forward(&q, &k, &v, segments, shape, &mut out, &mut lse);
    let expected = reference(&wide(&dout), &wide(&q), &wide(&k), &wide(&v), segments, shape);
    let tolerance = rounding::<T>(3e-6);
    // The probabilities of a row sum to 1, values are below 1: rounded to bf16, a probability as an operand is off by 2^-9 of
    // itself, the result by as much, and rounded again. `(1 + |out|) / 512 <= max(|out|, 1 / 3) / 128`.
    let floor = if tolerance == 1.0 / 128.0 { 1.0 / 3.0 } else { 0.2 };
    assert_close("out", &out, &expected.out, tolerance, floor);
    assert_close("lse", &lse, &expected.lse, 3e-6, 1.0);
    let garbage = T::from_f32(f32::NAN);
    let (mut dq, mut dk, mut dv) = (vec![garbage; nq], vec![garbage; nk], vec![garbage; nk]);
    attention_backward(&dout, &q, &k, &v, &out, &lse, segments, shape, &mut dq, &mut dk, &mut dv);
    assert_close("dq", &dq, &expected.dq, tolerance, 1.0);
    assert_close("dk", &dk, &expected.dk, tolerance, 1.0);
    assert_close("dv", &dv, &expected.dv, tolerance, 1.0);
}

#[test]
fn one_row_of_every_length_around_a_tile() {
    for len in [1, 2, 7, 31, 32, 33, 127, 128, 129, 200] {
        check::<f32>(2, 2, 16, &[segment(0, len, 0, len)], len, len);
    }
}

#[test]
fn grouped_heads_of_common_sizes() {
    for (heads, kv_heads, head_dim) in
        [(4, 2, 64), (9, 3, 64), (2, 1, 128), (6, 1, 80), (1, 1, 256), (2, 1, 300), (2, 1, 576), (3, 3, 5)]
    {
        check::<f32>(heads, kv_heads, head_dim, &[segment(0, 70, 0, 70)], 70, 70);
    }
}

#[test]
fn packed_rows_with_gaps_and_longer_keys() {
    let segments = [segment(40, 13, 100, 150), segment(0, 37, 0, 37), segment(60, 1, 37, 45), segment(53, 7, 90, 7)];
    check::<f32>(4, 2, 24, &segments, 64, 256);
    check::<bf16>(4, 2, 64, &segments, 64, 256);
    check::<f16>(4, 4, 32, &segments, 64, 256);
}

#[test]
fn more_queries_than_a_task_takes() {
    check::<f32>(1, 1, 8, &[segment(0, 700, 0, 730)], 700, 730);
}

#[test]
fn single_queries_over_keys_of_several_chunks() {
    let segments = [segment(0, 1, 3, 700), segment(1, 1, 703, 1), segment(2, 3, 704, 50), segment(5, 1, 760, 333)];
    check::<f32>(4, 2, 24, &segments, 6, 1100);
    check::<f32>(3, 1, 7, &segments, 6, 1100);
    check::<bf16>(9, 3, 64, &segments, 6, 1100);
    check::<f16>(8, 8, 128, &segments, 6, 1100);
}

#[test]
fn halves_of_every_length_around_a_tile() {
    for len in [1, 2, 15, 16, 17, 31, 33, 40, 127, 129, 250] {
        check::<bf16>(2, 1, 32, &[segment(0, len, 0, len)], len, len);
        check::<f16>(2, 1, 32, &[segment(0, len, 0, len)], len, len);
    }
}

#[test]
fn halves_of_every_size_of_head() {
    let segments = [segment(0, 70, 0, 70), segment(70, 35, 70, 101)];
    for (heads, kv_heads, head_dim) in [
        (9, 3, 64),
        (4, 2, 128),
        (2, 1, 48),
        (6, 1, 80),
        (2, 2, 96),
        (1, 1, 112),
        (2, 1, 256),
        (2, 1, 576),
        (1, 1, 66),
        (2, 1, 18),
    ] {
        check::<bf16>(heads, kv_heads, head_dim, &segments, 105, 171);
        check::<f16>(heads, kv_heads, head_dim, &segments, 105, 171);
    }
}

#[test]
fn a_long_row_whose_backward_is_cut_into_pieces() {
    // pieces of 512 keys: the queries begin in the second and end in the third
    for (q_len, kv_len) in [(1100, 1100), (600, 1300), (1, 1030)] {
        check::<f32>(2, 1, 16, &[segment(0, q_len, 0, kv_len)], q_len, kv_len);
        check::<bf16>(2, 1, 16, &[segment(0, q_len, 0, kv_len)], q_len, kv_len);
    }
}

#[test]
fn windows_and_chunks() {
    let segments = [segment(0, 300, 0, 300), segment(300, 1, 300, 77), segment(301, 40, 380, 333)];
    let reaches = [1, 2, 31, 100, 128, 299].map(|n| [Reach::Window(n), Reach::Chunk(n)]);
    for reach in reaches.into_iter().flatten() {
        check_shape::<f32>(&AttentionShape { reach, ..plain(2, 1, 20, 0.3) }, &segments, 341, 713);
        check_shape::<bf16>(&AttentionShape { reach, ..plain(2, 1, 32, 0.3) }, &segments, 341, 713);
    }
}

#[test]
fn windows_and_chunks_of_rows_cut_into_pieces() {
    for reach in [Reach::Window(3), Reach::Window(600), Reach::Chunk(500), Reach::Chunk(512)] {
        for (q_len, kv_len) in [(1100, 1100), (600, 1300)] {
            let row = [segment(0, q_len, 0, kv_len)];
            check_shape::<f32>(&AttentionShape { reach, ..plain(2, 1, 16, 0.4) }, &row, q_len, kv_len);
            check_shape::<bf16>(&AttentionShape { reach, ..plain(1, 1, 16, 0.4) }, &row, q_len, kv_len);
        }
    }
}

#[test]
fn soft_caps() {
    let segments = [segment(0, 150, 0, 150), segment(150, 1, 150, 77), segment(151, 40, 230, 233)];
    for (softcap, scale) in [(0.7, 0.4), (2.0, 0.4), (50.0, 0.2)] {
        for reach in [Reach::All, Reach::Window(50), Reach::Chunk(64)] {
            let shape = AttentionShape { reach, softcap: Some(softcap), ..plain(4, 2, 48, scale) };
            check_shape::<f32>(&shape, &segments, 191, 463);
            check_shape::<bf16>(&shape, &segments, 191, 463);
        }
    }
}

#[test]
fn sinks_are_logits_whose_share_is_dropped() {
    // one key more, of value zero, whose score is the sink: what it takes of the softmax is dropped
    let (tokens, heads, d) = (37, 3, 8);
    let sinks = [-1.5f32, 0.3, 4.0];
    let shape = plain(heads, heads, d, 0.5);
    let row = [segment(0, tokens, 0, tokens)];
    let n = tokens * heads * d;
    let [dout, q, k, v] = [1, 2, 3, 4].map(|seed| numbers::<f32>(n, seed));
    let (mut out, mut lse) = (vec![0.0; n], vec![0.0; tokens * heads]);
    attention_forward(&q, &k, &v, &row, &shape, &mut out, &mut lse);
    let without = reference(&wide(&dout), &wide(&q), &wide(&k), &wide(&v), &row, &shape);
    attention_sinks(&sinks, &mut out, &mut lse);
    let share = |i: usize| {
        let (sink, lse) = (f64::from(sinks[i % heads]).exp(), without.lse[i].exp());
        (sink / (sink + lse), (sink + lse).ln())
    };
    let want: Vec<f64> = without.out.iter().enumerate().map(|(i, x)| x * (1.0 - share(i / d).0)).collect();
    let want_lse: Vec<f64> = (0..lse.len()).map(|i| share(i).1).collect();
    assert_close("out", &out, &want, 3e-6, 0.2);
    assert_close("lse", &lse, &want_lse, 3e-6, 1.0);
    let mut dsinks = vec![0.0; heads];
    for (i, (dout, out)) in dout.chunks(d).zip(want.chunks(d)).enumerate() {
        let delta: f64 = dout.iter().zip(out).map(|(a, b)| f64::from(*a) * b).sum();
        dsinks[i % heads] -= share(i).0 * delta;
    }
    let got = attention_sinks_backward(&sinks, &dout, &out, &lse);
    assert_close("dsinks", &got, &dsinks, 1e-5, 1.0);
}

/// The rounding of probabilities and of their gradients to bf16 is that of independent numbers: it grows with the root of
/// how many are summed, where an operand in the wrong place would be off by as much as the sum itself.
#[test]
fn errors_of_bf16_are_those_of_rounding() {
    let (len, d) = (300, 64);
    let shape = plain(2, 1, d, 1.0);
    let (dout, q) = (numbers::<bf16>(len * 2 * d, 1), numbers::<bf16>(len * 2 * d, 2));
    let (k, v) = (numbers::<bf16>(len * d, 3), numbers::<bf16>(len * d, 4));
    let row = [segment(0, len, 0, len)];
    let (mut out, mut lse) = (q.clone(), vec![0.0; len * 2]);
    attention_forward(&q, &k, &v, &row, &shape, &mut out, &mut lse);
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    attention_backward(&dout, &q, &k, &v, &out, &lse, &row, &shape, &mut dq, &mut dk, &mut dv);
    let expected = reference(&wide(&dout), &wide(&q), &wide(&k), &wide(&v), &row, &shape);
    for (name, actual, expected) in
        [("out", &out, &expected.out), ("dq", &dq, &expected.dq), ("dk", &dk, &expected.dk), ("dv", &dv, &expected.dv)]
    {
        let square = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
        let error = square(&mut wide(actual).iter().zip(expected).map(|(a, e)| a - e));
        let relative = (error / square(&mut expected.iter().copied())).sqrt();
        // One rounding to bf16 is at most 2^-9 of a number. Here up to three add: of the operand, of `out` in the product with its
        // gradient, and of the result.
        assert!(relative < 3.0 / 512.0, "{name}: relative error {relative:e}");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let shape = plain(1, 1, 4, 1.0);
    let q: Vec<f32> = numbers::<f32>(160, 1).iter().map(|x| x * 60.0).collect();
    let k: Vec<f32> = numbers::<f32>(160, 2).iter().map(|x| x * 60.0).collect();
    let v = numbers::<f32>(160, 3);
    let (mut out, mut lse) = (vec![0.0; 160], vec![0.0; 40]);
    let row = [segment(0, 40, 0, 40)];
    attention_forward(&q, &k, &v, &row, &shape, &mut out, &mut lse);
    let expected = reference(&wide(&v), &wide(&q), &wide(&k), &wide(&v), &row, &shape);
    assert_close("out", &out, &expected.out, 1e-3, 1.0);
}

#[test]
fn threads_do_not_matter() {
    let shape = plain(4, 2, 64, 0.125);
    // the first row's backward is cut into pieces
    let segments = [segment(0, 1050, 0, 1050), segment(1050, 40, 1050, 60)];
    let (q, kv) = (numbers::<bf16>(1090 * 256, 1), numbers::<bf16>(1110 * 128, 2));
    same_on_any_threads(|| {
        let (mut out, mut lse) = (q.clone(), vec![0.0; 1090 * 4]);
        attention_forward(&q, &kv, &kv, &segments, &shape, &mut out, &mut lse);
        let (mut dq, mut dk, mut dv) = (q.clone(), kv.clone(), kv.clone());
        attention_backward(&q, &q, &kv, &kv, &out, &lse, &segments, &shape, &mut dq, &mut dk, &mut dv);
        (out, lse, dq, dk, dv)
    });
}
