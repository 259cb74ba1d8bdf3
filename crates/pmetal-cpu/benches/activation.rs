//! The gated activation at the shapes of training and of one token: `cargo bench -p pmetal-cpu --bench activation`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{TRAINING, Work, assert_close, numbers, rounding, settings, time, wide};
use pmetal_cpu::{swiglu_backward, swiglu_forward};

fn activations(criterion: &mut Criterion) {
    for shape in TRAINING {
        of_elements(criterion, shape.name, shape.tokens() * shape.mlp);
        of_elements(criterion, &format!("{}, one token", shape.name), shape.mlp);
    }
}

fn of_elements(criterion: &mut Criterion, name: &str, n: usize) {
    let [gate, up, dy] = [1, 2, 3].map(|seed| numbers::<bf16>(n, seed));
    let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![bf16::ZERO; n]);

    swiglu_forward(&gate, &up, &mut y);
    swiglu_backward(&dy, &gate, &up, &mut dgate, &mut dup);
    let (g, u, d) = (wide(&gate), wide(&up), wide(&dy));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let expected = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<f64>>();
    let tolerance = rounding::<bf16>(0.0);
    assert_close("y", &y, &expected(&|i| g[i] * sigmoid(g[i]) * u[i]), tolerance, 1e-2);
    assert_close("dup", &dup, &expected(&|i| g[i] * sigmoid(g[i]) * d[i]), tolerance, 1e-2);
    let slope = |g: f64| sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g)));
    assert_close("dgate", &dgate, &expected(&|i| slope(g[i]) * u[i] * d[i]), tolerance, 1e-2);

    let bytes = |tensors: usize| Work::Bytes(tensors * n * size_of::<bf16>());
    time(criterion, &format!("activation: swiglu forward, {name}"), bytes(3), || swiglu_forward(&gate, &up, &mut y));
    if n > 1 << 16 {
        time(criterion, &format!("activation: swiglu backward, {name}"), bytes(5), || {
            swiglu_backward(&dy, &gate, &up, &mut dgate, &mut dup);
        });
    }
}

criterion_group! {
    name = benches;
    config = settings();
    targets = activations
}
criterion_main!(benches);
