//! Cross-entropy against f64, AdamW against torch, the norm of a gradient.

mod common;

use common::{assert_close, numbers, same_on_any_threads, wide};
use pmetal_cpu::{AdamW, adamw, cross_entropy_losses, cross_entropy_rows, softcap, sum_of_squares};

#[test]
fn cross_entropy_and_its_gradient() {
    for vocab in [1, 7, 64, 1003, 5000] {
        let rows = 5;
        let logits: Vec<f32> = numbers::<f32>(rows * vocab, 1).iter().map(|x| x * 30.0 + 200.0).collect();
        let labels: Vec<i64> =
            (0..rows as i64).map(|r| if r == 2 { -100 } else { (r * 13 + 3) % vocab as i64 }).collect();
        let mut losses = vec![f32::NAN; rows];
        cross_entropy_losses(&logits, vocab, &labels, &mut losses);
        let (mut gradient, mut again) = (logits.clone(), vec![f32::NAN; rows]);
        cross_entropy_rows(&mut gradient, vocab, &labels, 0.25, None, &mut again);
        let mut expected_losses = Vec::new();
        let mut expected_gradient = Vec::new();
        for (row, &label) in wide(&logits).chunks(vocab).zip(&labels) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            expected_losses.push(if label < 0 { 0.0 } else { lse - row[label as usize] });
            expected_gradient.extend(row.iter().enumerate().map(|(j, x)| {
                let target = if j as i64 == label { 1.0 } else { 0.0 };
                if label < 0 { 0.0 } else { 0.25 * ((x - lse).exp() - target) }
            }));
        }
        assert_close("losses", &losses, &expected_losses, 1e-6, 1.0);
        assert!(again == losses, "one way to a loss");
        assert_close("gradient", &gradient, &expected_gradient, 1e-6, 0.25);
    }
}

#[test]
fn a_cap_on_logits_and_the_gradient_before_it() {
    // far beyond the cap, about its size, and so small that the cap hardly bends them
    for (size, cap) in [(300.0, 30.0), (40.0, 30.0), (1e-3, 2.0)] {
        for vocab in [1, 7, 1003] {
            let before: Vec<f32> = numbers::<f32>(3 * vocab, 1).iter().map(|x| x * size).collect();
            let labels = [(vocab / 2) as i64, -100, vocab as i64 - 1];
            let mut logits = before.clone();
            softcap(&mut logits, cap);
            let exact: Vec<f64> =
                before.iter().map(|&x| f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh()).collect();
            for (&got, &want) in logits.iter().zip(&exact) {
                assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs(), "{got} for {want}");
            }
            let mut losses = [f32::NAN; 3];
            cross_entropy_rows(&mut logits, vocab, &labels, 0.25, Some(cap), &mut losses);
            let mut gradient = Vec::new();
            for (row, &label) in exact.chunks(vocab).zip(&labels) {
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
                gradient.extend(row.iter().enumerate().map(|(j, x)| {
                    let target = if j as i64 == label { 1.0 } else { 0.0 };
                    let slope = 1.0 - (x / f64::from(cap)).powi(2);
                    if label < 0 { 0.0 } else { 0.25 * slope * ((x - lse).exp() - target) }
                }));
            }
            assert_close("gradient", &logits, &gradient, 1e-6, 0.25);
        }
    }
}

#[test]
fn classes_that_are_ruled_out_have_no_gradient() {
    let mut logits = vec![f32::NEG_INFINITY; 5000];
    (logits[4000], logits[4990]) = (2.0, 2.0);
    let mut losses = [0.0];
    cross_entropy_rows(&mut logits, 5000, &[4000], 1.0, None, &mut losses);
    assert!((losses[0] - std::f32::consts::LN_2).abs() < 1e-6, "{}", losses[0]);
    for (i, &g) in logits.iter().enumerate() {
        assert_eq!(g, [(4000, -0.5), (4990, 0.5)].iter().find(|(at, _)| *at == i).map_or(0.0, |&(_, g)| g));
    }
}

#[test]
fn a_bad_logit_is_not_hidden() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = numbers::<f32>(100, 1);
        logits[41] = bad;
        let mut losses = [0.0];
        cross_entropy_losses(&logits, 100, &[3], &mut losses);
        assert!(!losses[0].is_finite());
        cross_entropy_rows(&mut logits, 100, &[3], 1.0, None, &mut losses);
        assert!(!losses[0].is_finite());
    }
}

/// ```python
/// p = torch.tensor([((i * 7919) % 1000) / 500 - 1 for i in range(12)]).requires_grad_()
/// opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
/// for step in range(1, 6):
///     p.grad = torch.tensor([((i * 104729 + step * 31) % 997) / 500 - 1 for i in range(12)])
///     opt.step()
/// ```
#[test]
fn adamw_follows_torch() {
    let expected = [
        -0.945_542_5,
        0.883_220_8,
        0.721_942_6,
        0.560_630_6,
        0.399_262_7,
        0.237_792_36,
        0.076_109_41,
        -0.086_106_51,
        -0.250_099_96,
        -0.422_020_8,
        -0.615_173_7,
        -0.825_028_36,
    ];
    let mut p: Vec<f32> = (0..12).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
    let (mut m, mut v) = (vec![0.0; 12], vec![0.0; 12]);
    for step in 1..=5 {
        // Half the gradient and a scale of two: the scale is part of the step.
        let g: Vec<f32> = (0..12).map(|i| (((i * 104_729 + step * 31) % 997) as f32 / 500.0 - 1.0) / 2.0).collect();
        let cfg =
            AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: step as u64 };
        adamw(&mut p, &mut m, &mut v, &g, 2.0, &cfg);
    }
    assert_close("p", &p, &expected, 3e-7, 1.0);
}

#[test]
fn sum_of_squares_is_exact_enough_and_shows_what_is_wrong() {
    for n in [0, 1, 15, 100_003] {
        let x = numbers::<f32>(n, 1);
        let exact: f64 = wide(&x).iter().map(|x| x * x).sum();
        assert!((sum_of_squares(&x) - exact).abs() <= 1e-12 * exact);
    }
    let mut x = numbers::<f32>(50_000, 1);
    same_on_any_threads(|| sum_of_squares(&x));
    x[44_444] = f32::NAN;
    assert!(sum_of_squares(&x).is_nan());
    x[44_444] = f32::INFINITY;
    assert_eq!(sum_of_squares(&x), f64::INFINITY);
}
