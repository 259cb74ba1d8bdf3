//! AdamW over all parameters of an adapter: `cargo bench -p pmetal-cpu --bench optimizer`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use harness::{Work, assert_close, numbers, settings, time, wide};
use pmetal_cpu::{AdamW, adamw, sum_of_squares};

/// Parameters of adapters of rank 16 on every linear layer.
const ADAPTERS: [(&str, usize); 2] = [("qwen3-cpu", 1_441_792), ("SmolLM2", 4_884_480)];

fn steps(criterion: &mut Criterion) {
    for (name, n) in ADAPTERS {
        let (mut p, g) = (numbers::<f32>(n, 1), numbers::<f32>(n, 2));
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let mut cfg = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 1 };

        let (before, gradient) = (wide(&p), wide(&g));
        adamw(&mut p, &mut m, &mut v, &g, 0.5, &cfg);
        // after the first step both moments are corrected to the gradient itself
        let moved = before.iter().zip(&gradient).map(|(p, g)| {
            let g = 0.5 * g;
            p * (1.0 - 1e-4) - 1e-3 * g / (g.abs() + 1e-8)
        });
        assert_close("p", &p, &moved.collect::<Vec<_>>(), 1e-6, 1.0);
        // block by block: a single running sum of millions would be the less exact of the two
        let exact: f64 = gradient.chunks(1024).map(|block| block.iter().map(|g| g * g).sum::<f64>()).sum();
        assert!((sum_of_squares(&g) - exact).abs() <= 1e-12 * exact, "sum_of_squares");

        let bytes = |tensors: usize| Work::Bytes(tensors * n * size_of::<f32>());
        time(criterion, &format!("optimizer: adamw, {name}"), bytes(7), || {
            cfg.step += 1;
            adamw(&mut p, &mut m, &mut v, &g, 0.5, &cfg);
        });
        time(criterion, &format!("optimizer: norm of the gradient, {name}"), bytes(1), || {
            std::hint::black_box(sum_of_squares(&g));
        });
    }
}

criterion_group! {
    name = benches;
    config = settings();
    targets = steps
}
criterion_main!(benches);
