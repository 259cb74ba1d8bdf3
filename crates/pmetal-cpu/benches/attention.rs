//! Attention at the shapes of training and of one token: `cargo bench -p pmetal-cpu --bench attention`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{Shape, TRAINING, Work, assert_close, numbers, rounding, settings, time, wide};
use pmetal_cpu::{AttentionShape, Reach, Segment, attention_backward, attention_forward};

fn attentions(criterion: &mut Criterion) {
    for shape in TRAINING {
        training(criterion, &shape);
        one_token(criterion, &shape, 640);
    }
}

fn heads(shape: &Shape) -> AttentionShape {
    let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { heads, kv_heads, head_dim, scale, reach: Reach::All, softcap: None }
}

fn training(criterion: &mut Criterion, shape: &Shape) {
    let heads = heads(shape);
    let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let segments: Vec<Segment> = (0..shape.rows)
        .map(|row| row * shape.row_len)
        .map(|at| Segment { q_start: at, q_len: shape.row_len, kv_start: at, kv_len: shape.row_len })
        .collect();
    let [q, dout] = [1, 2].map(|seed| numbers::<bf16>(shape.tokens() * queries, seed));
    let [k, v] = [3, 4].map(|seed| numbers::<bf16>(shape.tokens() * keys, seed));
    let (mut out, mut lse) = (q.clone(), vec![0.0; shape.tokens() * shape.heads]);
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());

    attention_forward(&q, &k, &v, &segments, &heads, &mut out, &mut lse);
    attention_backward(&dout, &q, &k, &v, &out, &lse, &segments, &heads, &mut dq, &mut dk, &mut dv);
    let inputs = Inputs { q: wide(&q), k: wide(&k), v: wide(&v), dout: wide(&dout), heads };
    let tolerance = rounding::<bf16>(0.0);
    for (query, head) in [(0, 0), (77, 1), (shape.row_len - 1, shape.heads - 1)] {
        let expected = inputs.query(query, head);
        let at = (query * shape.heads + head) * shape.head_dim;
        assert_close("out", &out[at..][..shape.head_dim], &expected.out, tolerance, 0.2);
        assert_close("dq", &dq[at..][..shape.head_dim], &expected.dq, tolerance, 1.0);
    }
    for (key, kv_head) in [(shape.row_len - 1, 0), (shape.row_len - 50, shape.kv_heads - 1)] {
        let (expected_dk, expected_dv) = inputs.key(key, kv_head, shape.row_len);
        let at = (key * shape.kv_heads + kv_head) * shape.head_dim;
        assert_close("dk", &dk[at..][..shape.head_dim], &expected_dk, tolerance, 1.0);
        assert_close("dv", &dv[at..][..shape.head_dim], &expected_dv, tolerance, 1.0);
    }

    let pairs = shape.rows * shape.row_len * (shape.row_len + 1) / 2;
    // two products of heads in the forward; five in the backward, which computes the scores again
    let flops = |products: usize| Work::Flops(products * 2 * pairs * queries);
    time(criterion, &format!("attention: forward, {}", shape.name), flops(2), || {
        attention_forward(&q, &k, &v, &segments, &heads, &mut out, &mut lse);
    });
    time(criterion, &format!("attention: backward, {}", shape.name), flops(5), || {
        attention_backward(&dout, &q, &k, &v, &out, &lse, &segments, &heads, &mut dq, &mut dk, &mut dv);
    });
}

fn one_token(criterion: &mut Criterion, shape: &Shape, keys: usize) {
    let heads = heads(shape);
    let q = numbers::<bf16>(shape.heads * shape.head_dim, 1);
    let [k, v] = [2, 3].map(|seed| numbers::<bf16>(keys * shape.kv_heads * shape.head_dim, seed));
    let (mut out, mut lse) = (q.clone(), vec![0.0; shape.heads]);
    let segments = [Segment { q_start: 0, q_len: 1, kv_start: 0, kv_len: keys }];

    attention_forward(&q, &k, &v, &segments, &heads, &mut out, &mut lse);
    // the last token of a row is the one that sees all keys
    let mut queries = vec![0.0; (keys - 1) * q.len()];
    queries.extend(wide(&q));
    let inputs = Inputs { dout: queries.clone(), q: queries, k: wide(&k), v: wide(&v), heads };
    for (head, out) in out.chunks(shape.head_dim).enumerate() {
        assert_close("out", out, &inputs.query(keys - 1, head).out, rounding::<bf16>(0.0), 0.2);
    }

    let bytes = Work::Bytes(2 * size_of_val(&*k));
    time(criterion, &format!("attention: one token on {keys} keys, {}", shape.name), bytes, || {
        attention_forward(&q, &k, &v, &segments, &heads, &mut out, &mut lse);
    });
}

/// The first row of a batch in f64.
struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
    heads: AttentionShape,
}

struct OfQuery {
    out: Vec<f64>,
    dq: Vec<f64>,
    probabilities: Vec<f64>,
    /// Gradients of the scores, before the scale.
    dscores: Vec<f64>,
}

impl Inputs {
    fn of<'a>(&self, x: &'a [f64], heads: usize, token: usize, head: usize) -> &'a [f64] {
        &x[(token * heads + head) * self.heads.head_dim..][..self.heads.head_dim]
    }

    fn query(&self, query: usize, head: usize) -> OfQuery {
        let AttentionShape { heads, kv_heads, head_dim, scale, .. } = self.heads;
        let kv_head = head / (heads / kv_heads);
        let (q, dout) = (self.of(&self.q, heads, query, head), self.of(&self.dout, heads, query, head));
        let key = |j| self.of(&self.k, kv_heads, j, kv_head);
        let value = |j| self.of(&self.v, kv_heads, j, kv_head);
        let exponentials: Vec<f64> = (0..=query).map(|j| (f64::from(scale) * dot(q, key(j))).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        let probabilities: Vec<f64> = exponentials.iter().map(|x| x / sum).collect();
        let out = weighted(&probabilities, value, head_dim);
        let delta = dot(dout, &out);
        let dscores: Vec<f64> =
            (0..=query).map(|j| f64::from(scale) * probabilities[j] * (dot(dout, value(j)) - delta)).collect();
        let dq = weighted(&dscores, key, head_dim);
        OfQuery { out, dq, probabilities, dscores }
    }

    /// The gradients of a key and its value, from all queries of a row of `row_len` that see it.
    fn key(&self, key: usize, kv_head: usize, row_len: usize) -> (Vec<f64>, Vec<f64>) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.heads;
        let (mut dk, mut dv) = (vec![0.0; head_dim], vec![0.0; head_dim]);
        let group = heads / kv_heads;
        for (query, head) in (key..row_len).flat_map(|i| (0..group).map(move |g| (i, kv_head * group + g))) {
            let of_query = self.query(query, head);
            let (q, dout) = (self.of(&self.q, heads, query, head), self.of(&self.dout, heads, query, head));
            for e in 0..head_dim {
                dk[e] += of_query.dscores[key] * q[e];
                dv[e] += of_query.probabilities[key] * dout[e];
            }
        }
        (dk, dv)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn weighted<'a>(weights: &[f64], row: impl Fn(usize) -> &'a [f64], head_dim: usize) -> Vec<f64> {
    let mut sum = vec![0.0; head_dim];
    for (j, weight) in weights.iter().enumerate() {
        sum.iter_mut().zip(row(j)).for_each(|(sum, x)| *sum += weight * x);
    }
    sum
}

criterion_group! {
    name = benches;
    config = settings();
    targets = attentions
}
criterion_main!(benches);
