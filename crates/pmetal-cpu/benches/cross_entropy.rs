//! The loss of a block of logits and its gradient: `cargo bench -p pmetal-cpu --bench cross_entropy`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use harness::{TRAINING, Work, assert_close, numbers, settings, time, wide};
use pmetal_cpu::{cross_entropy_losses, cross_entropy_rows};

/// Tokens whose logits exist at one time.
const ROWS: usize = 64;

fn losses(criterion: &mut Criterion) {
    for shape in TRAINING {
        let vocab = shape.vocab;
        let mut logits = numbers::<f32>(ROWS * vocab, 1);
        let labels: Vec<i64> = (0..ROWS as i64).map(|row| row * 311 % vocab as i64).collect();
        let mut losses = vec![0.0; ROWS];

        let before = logits[..vocab].to_vec();
        cross_entropy_losses(&logits, vocab, &labels, &mut losses);
        let exponentials: Vec<f64> = wide(&before).iter().map(|x| x.exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        assert_close("loss", &losses[..1], &[sum.ln() - f64::from(before[0])], 1e-6, 1.0);
        let bytes = |tensors: usize| Work::Bytes(tensors * size_of_val(&*logits));
        let (reading, both) = (bytes(1), bytes(2));
        time(criterion, &format!("cross_entropy: losses of {ROWS} tokens, {}", shape.name), reading, || {
            cross_entropy_losses(&logits, vocab, &labels, &mut losses);
        });

        cross_entropy_rows(&mut logits, vocab, &labels, 0.5, None, &mut losses);
        let target = |j: usize| if j == 0 { 1.0 } else { 0.0 };
        let gradient: Vec<f64> = (0..vocab).map(|j| 0.5 * (exponentials[j] / sum - target(j))).collect();
        assert_close("gradient", &logits[..vocab], &gradient, 1e-5, 1e-5);
        // the gradient of a gradient: as much work, on numbers of no meaning
        time(criterion, &format!("cross_entropy: gradient of {ROWS} tokens, {}", shape.name), both, || {
            cross_entropy_rows(&mut logits, vocab, &labels, 0.5, None, &mut losses);
        });
    }
}

criterion_group! {
    name = benches;
    config = settings();
    targets = losses
}
criterion_main!(benches);
