//! `attention_plain.metal` against attention in f64, at any width of a head, with and without a cache, whole and in parts, over windows and
//! chunks, and with a cap on scores.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{Grid, Reach, empty, kernels, limits};

const SCALE: f32 = 0.3;

#[derive(Clone, Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    d: usize,
    /// Queries and keys of each row.
    rows: Vec<(usize, usize)>,
    /// Places of a row among the keys; none where rows lie behind one another.
    capacity: Option<usize>,
    dtype: DType,
    threads: usize,
    reach: Reach,
    softcap: Option<f32>,
}

impl Case {
    fn tokens(&self) -> usize {
        self.rows.iter().map(|row| row.0).sum()
    }

    fn kv_tokens(&self) -> usize {
        self.capacity.map_or(self.rows.iter().map(|row| row.1).sum(), |capacity| capacity * self.rows.len())
    }

    /// First query, queries, first key, keys of each row.
    fn table(&self) -> Vec<[usize; 4]> {
        let (mut query, mut key) = (0, 0);
        let rows = self.rows.iter().map(|&(q_len, kv_len)| {
            let row = [query, q_len, key, kv_len];
            query += q_len;
            key += self.capacity.unwrap_or(kv_len);
            row
        });
        rows.collect()
    }

    fn grid(&self, x: usize, y: usize) -> Grid {
        Grid { groups: [x, y, self.rows.len()], threads: self.threads }
    }

    fn random(&self, shape: [usize; 2], seed: u64) -> Tensor {
        let n = shape.iter().product::<usize>() as u64;
        let values: Vec<f32> = (0..n).map(|i| 2.0 * pmetal_cpu::uniform(seed, i) - 1.0).collect();
        Tensor::from_vec(values, &shape[..], &Device::Cpu).unwrap().to_dtype(self.dtype).unwrap()
    }
}

fn wide(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [f64], factor: f64, x: &[f64]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
}

/// `[out, lse, dq, dk, dv]` in f64.
fn want(case: &Case, [q, k, v, dout]: [&Tensor; 4]) -> [Vec<f64>; 5] {
    let [q, k, v, dout] = [q, k, v, dout].map(wide);
    let (d, group) = (case.d, case.heads / case.kv_heads);
    let mut out = vec![0.0; q.len()];
    let mut lse = vec![0.0; q.len() / d];
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for [first_query, queries, first_key, keys] in case.table() {
        for (i, head) in (0..queries).flat_map(|i| (0..case.heads).map(move |head| (i, head))) {
            let place = (first_query + i) * case.heads + head;
            let own = place * d..(place + 1) * d;
            let position = keys - queries + i;
            let keys = (case.reach.first(position)..=position).map(|j| {
                let at = ((first_key + j) * case.kv_heads + head / group) * d;
                at..at + d
            });
            let keys: Vec<_> = keys.collect();
            let scores = keys.iter().map(|key| f64::from(SCALE) * dot(&q[own.clone()], &k[key.clone()]));
            // scores and their slopes
            let capped = scores.map(|score| match case.softcap.map(f64::from) {
                Some(cap) => (cap * (score / cap).tanh(), 1.0 - (score / cap).tanh().powi(2)),
                None => (score, 1.0),
            });
            let (scores, slopes): (Vec<f64>, Vec<f64>) = capped.unzip();
            lse[place] = scores.iter().map(|score| score.exp()).sum::<f64>().ln();
            let weights: Vec<f64> = scores.iter().map(|score| (score - lse[place]).exp()).collect();
            for (key, &weight) in keys.iter().zip(&weights) {
                add(&mut out[own.clone()], weight, &v[key.clone()]);
            }
            // the backward sees the result as it was stored
            let stored = Tensor::new(&out[own.clone()], &Device::Cpu).unwrap().to_dtype(case.dtype).unwrap();
            let delta = dot(&dout[own.clone()], &wide(&stored));
            for ((key, &weight), slope) in keys.iter().zip(&weights).zip(&slopes) {
                let dweight = dot(&dout[own.clone()], &v[key.clone()]);
                let dscore = f64::from(SCALE) * slope * weight * (dweight - delta);
                add(&mut dv[key.clone()], weight, &dout[own.clone()]);
                add(&mut dk[key.clone()], dscore, &q[own.clone()]);
                add(&mut dq[own.clone()], dscore, &k[key.clone()]);
            }
        }
    }
    [out, lse, dq, dk, dv]
}

fn check(case: &Case) {
    let gpu = Emulator::new();
    let (tokens, kv_tokens, d, dtype) = (case.tokens(), case.kv_tokens(), case.d, case.dtype);
    let (q_shape, kv_shape) = ([tokens, case.heads * d], [kv_tokens, case.kv_heads * d]);
    let [q, dout] = [1, 2].map(|seed| case.random(q_shape, seed));
    let [k, v] = [3, 4].map(|seed| case.random(kv_shape, seed));
    let table: Vec<u32> = case.table().iter().flatten().map(|&x| x as u32).collect();
    let rows = Tensor::from_vec(table, (case.rows.len(), 4), &Device::Cpu).unwrap();
    let (heads, kv_heads, width) = (case.heads as u32, case.kv_heads as u32, d as u32);
    let [q_pitch, kv_pitch] = [q_shape, kv_shape].map(|[_, width]| width as u32);
    let ([window, chunk], cap) = (limits(case.reach), case.softcap.unwrap_or_default());
    let params = kernels::AttentionParams {
        heads,
        kv_heads,
        d: width,
        scale: SCALE,
        window,
        chunk,
        cap,
        q_pitch,
        k_pitch: kv_pitch,
        v_pitch: kv_pitch,
        out_pitch: q_pitch,
        dout_pitch: q_pitch,
        dq_pitch: q_pitch,
        dk_pitch: kv_pitch,
        dv_pitch: kv_pitch,
    };
    let new = |shape: &[usize], dtype| empty(shape, dtype, &Device::Cpu).unwrap();
    let (longest, most_keys) =
        (case.rows.iter().map(|row| row.0).max().unwrap(), case.rows.iter().map(|row| row.1).max().unwrap());
    let want = want(case, [&q, &k, &v, &dout]);
    let close = |what: &str, want: &[f64], got: &Tensor, tolerance: f64| {
        let got = wide(got);
        let scale = want.iter().fold(1e-3f64, |max, x| max.max(x.abs()));
        let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst <= tolerance * scale, "{case:?} {what}: differs by {worst:e}, largest {scale:e}");
        assert!(want.len() == got.len() && got.iter().all(|x| x.is_finite()), "{case:?} {what}");
    };
    let rounding = if dtype == DType::F32 { 2e-6 } else { 4e-3 };

    let (out, lse) = (new(&q_shape, dtype), new(&[tokens, case.heads], DType::F32));
    let grid = case.grid(longest, case.heads);
    kernels::attention_plain(&gpu, dtype, grid, &q, &k, &v, &rows, &out, &lse, params).unwrap();
    close("out", &want[0], &out, rounding);
    close("lse", &want[1], &lse, 2e-6);

    for splits in [1, 3, 40] {
        let part = new(&[splits, tokens, case.heads, d], DType::F32);
        let part_lse = new(&[splits, tokens, case.heads], DType::F32);
        let split = kernels::SplitParams {
            tokens: tokens as u32,
            splits: splits as u32,
            heads,
            kv_heads,
            d: width,
            scale: SCALE,
            window,
            chunk,
            cap,
            q_pitch,
            k_pitch: kv_pitch,
            v_pitch: kv_pitch,
        };
        let grid = case.grid(longest * splits, case.heads);
        kernels::attention_plain_split(&gpu, dtype, grid, &q, &k, &v, &rows, &part, &part_lse, split).unwrap();
        let places = tokens * case.heads;
        let merge =
            kernels::MergeParams { places: places as u32, heads, d: width, splits: splits as u32, out_pitch: q_pitch };
        let (out, lse) = (new(&q_shape, dtype), new(&[tokens, case.heads], DType::F32));
        let grid = Grid::line(places, 32);
        kernels::attention_plain_merge(&gpu, dtype, grid, &part, &part_lse, &out, &lse, merge).unwrap();
        close("merged out", &want[0], &out, rounding);
        close("merged lse", &want[1], &lse, 2e-6);
    }

    let (dq, delta) = (new(&q_shape, dtype), new(&[tokens, case.heads], DType::F32));
    kernels::attention_plain_dq(&gpu, dtype, grid, &dout, &q, &k, &v, &out, &lse, &rows, &dq, &delta, params).unwrap();
    // keys of no row keep what they had
    let zeros = || Tensor::zeros(&kv_shape[..], dtype, &Device::Cpu).unwrap();
    let (dk, dv) = (zeros(), zeros());
    let grid = case.grid(most_keys, case.kv_heads);
    kernels::attention_plain_dkv(&gpu, dtype, grid, &dout, &q, &k, &v, &lse, &delta, &rows, &dk, &dv, params).unwrap();
    let rounding = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    close("dq", &want[2], &dq, rounding);
    close("dk", &want[3], &dk, rounding);
    close("dv", &want[4], &dv, rounding);
}

/// Without a window, a chunk or a cap.
fn plain(heads: usize, kv_heads: usize, d: usize, rows: &[(usize, usize)], capacity: Option<usize>) -> Case {
    let (rows, dtype, threads) = (rows.to_vec(), DType::F32, 128);
    Case { heads, kv_heads, d, rows, capacity, dtype, threads, reach: Reach::All, softcap: None }
}

#[test]
fn packed_rows_at_any_width_of_a_head() {
    for (d, threads) in [(1, 32), (6, 256), (8, 64), (64, 128), (80, 256), (130, 64), (256, 256)] {
        for dtype in [DType::F32, DType::BF16] {
            check(&Case { dtype, threads, ..plain(4, 2, d, &[(3, 3), (1, 1), (9, 9)], None) });
        }
    }
}

#[test]
fn rows_that_continue_in_a_cache() {
    let rows = [(2, 5), (1, 37), (4, 4), (1, 40)];
    for (heads, kv_heads, threads) in [(6, 2, 256), (3, 3, 32), (4, 1, 96)] {
        check(&Case { threads, ..plain(heads, kv_heads, 20, &rows, Some(41)) });
    }
    check(&Case { dtype: DType::F16, ..plain(4, 2, 32, &rows, Some(41)) });
}

#[test]
fn windows_and_chunks() {
    let (packed, cached) = ([(3, 3), (1, 1), (23, 23)], [(2, 5), (1, 37), (4, 4), (9, 40)]);
    for reach in [1, 4, 7, 36].into_iter().flat_map(|n| [Reach::Window(n), Reach::Chunk(n)]) {
        check(&Case { reach, ..plain(4, 2, 20, &packed, None) });
        check(&Case { reach, ..plain(4, 2, 6, &cached, Some(41)) });
    }
}

#[test]
fn caps_on_scores() {
    let (packed, cached) = ([(3, 3), (1, 1), (23, 23)], [(2, 5), (1, 37), (4, 4), (9, 40)]);
    for (softcap, reach) in [(0.5, Reach::All), (0.1, Reach::Window(5)), (2.0, Reach::Chunk(6)), (50.0, Reach::All)] {
        for (d, dtype) in [(20, DType::F32), (130, DType::F32), (7, DType::F16), (64, DType::BF16)] {
            check(&Case { reach, softcap: Some(softcap), dtype, ..plain(4, 2, d, &packed, None) });
        }
        check(&Case { reach, softcap: Some(softcap), ..plain(4, 2, 20, &cached, Some(41)) });
    }
}
