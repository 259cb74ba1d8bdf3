//! RMSNorm at the shapes of training and of one token: `cargo bench -p pmetal-cpu --bench norm`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{TRAINING, Work, assert_close, numbers, rounding, settings, time, wide};
use pmetal_cpu::{add_rms_norm_forward, rms_norm_backward, rms_norm_forward};

const EPS: f32 = 1e-6;

fn norms(criterion: &mut Criterion) {
    for shape in TRAINING {
        of_rows(criterion, shape.name, shape.tokens(), shape.hidden);
        of_rows(criterion, &format!("{}, one token", shape.name), 1, shape.hidden);
        of_rows(criterion, &format!("{}, heads", shape.name), shape.tokens() * shape.heads, shape.head_dim);
    }
}

fn of_rows(criterion: &mut Criterion, name: &str, rows: usize, width: usize) {
    let n = rows * width;
    let [x, residual, dy, dsum] = [1, 2, 3, 4].map(|seed| numbers::<bf16>(n, seed));
    let weight = numbers::<bf16>(width, 5);
    let [mut sum, mut y, mut dx] = [0; 3].map(|_| vec![bf16::ZERO; n]);
    let mut rstd = vec![0.0; rows];

    add_rms_norm_forward(&x, &residual, &weight, EPS, true, width, &mut sum, &mut y, &mut rstd);
    rms_norm_backward(&dy, &sum, &weight, &rstd, true, width, Some(&dsum), &mut dx, None);
    for row in [0, rows / 2, rows - 1] {
        let at = row * width..(row + 1) * width;
        let [sums, dys, dsums, weights] = [&sum[at.clone()], &dy[at.clone()], &dsum[at.clone()], &weight].map(wide);
        let (normalised, dxs) = reference(&sums, &weights, &dys, &dsums);
        let tolerance = 2.0 * rounding::<bf16>(0.0);
        assert_close("y", &y[at.clone()], &normalised, tolerance, 0.1);
        assert_close("dx", &dx[at], &dxs, tolerance, 2.0);
    }

    let bytes = |tensors: usize| Work::Bytes(tensors * n * size_of::<bf16>());
    time(criterion, &format!("norm: forward, {name}"), bytes(2), || {
        rms_norm_forward(&x, &weight, EPS, true, width, &mut y, &mut rstd);
    });
    time(criterion, &format!("norm: forward with residual, {name}"), bytes(4), || {
        add_rms_norm_forward(&x, &residual, &weight, EPS, true, width, &mut sum, &mut y, &mut rstd);
    });
    if rows > 1 {
        time(criterion, &format!("norm: backward with residual, {name}"), bytes(4), || {
            rms_norm_backward(&dy, &sum, &weight, &rstd, true, width, Some(&dsum), &mut dx, None);
        });
    }
}

/// A normalised row and the gradient of what was normalised.
fn reference(x: &[f64], weight: &[f64], dy: &[f64], dsum: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let width = x.len() as f64;
    let rstd = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / width + f64::from(EPS)).sqrt();
    let y = x.iter().zip(weight).map(|(x, w)| x * rstd * w).collect();
    let g: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
    let mean = g.iter().zip(x).map(|(g, x)| g * x * rstd).sum::<f64>() / width;
    let dx = (0..x.len()).map(|i| rstd * (g[i] - x[i] * rstd * mean) + dsum[i]).collect();
    (y, dx)
}

criterion_group! {
    name = benches;
    config = settings();
    targets = norms
}
criterion_main!(benches);
