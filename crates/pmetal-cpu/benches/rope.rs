//! Rotary position embedding at the shapes of training and of one token: `cargo bench -p pmetal-cpu --bench rope`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{TRAINING, Work, assert_close, numbers, rounding, settings, time, wide};
use pmetal_cpu::{HeadLayout, rope};

fn ropes(criterion: &mut Criterion) {
    for shape in TRAINING {
        for (name, tokens) in [(shape.name.to_string(), shape.tokens()), (format!("{}, one token", shape.name), 1)] {
            of_heads(criterion, &name, tokens, shape.heads, shape.head_dim);
        }
    }
}

fn of_heads(criterion: &mut Criterion, name: &str, tokens: usize, heads: usize, head_dim: usize) {
    let half = head_dim / 2;
    let angle = |token: usize, pair: usize| token as f64 * 1e4f64.powf(-(pair as f64) / half as f64);
    let angles: Vec<f64> = (0..tokens * half).map(|i| angle(i / half, i % half)).collect();
    let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
    let mut x = numbers::<bf16>(tokens * heads * head_dim, 1);

    let before = wide(&x);
    rope(&mut x, heads, HeadLayout::whole(head_dim), &cos, &sin, false);
    for token in [0, tokens / 2, tokens - 1] {
        for head in (token * heads..(token + 1) * heads).map(|head| head * head_dim..(head + 1) * head_dim) {
            let mut expected = before[head.clone()].to_vec();
            let (low, high) = expected.split_at_mut(half);
            for ((a, b), angle) in low.iter_mut().zip(high).zip(&angles[token * half..]) {
                (*a, *b) = (*a * angle.cos() - *b * angle.sin(), *b * angle.cos() + *a * angle.sin());
            }
            assert_close("rope", &x[head], &expected, rounding::<bf16>(0.0), 0.5);
        }
    }

    let bytes = 2 * x.len() * size_of::<bf16>() + 2 * cos.len() * size_of::<f32>();
    // back by the same angle: the numbers stay as large as they are
    let mut inverse = true;
    time(criterion, &format!("rope: in place, {name}"), Work::Bytes(bytes), || {
        rope(&mut x, heads, HeadLayout::whole(head_dim), &cos, &sin, inverse);
        inverse = !inverse;
    });
}

criterion_group! {
    name = benches;
    config = settings();
    targets = ropes
}
criterion_main!(benches);
