//! Norms and their gradients against f64 formulas and central differences.

mod common;

use common::{assert_close, numbers, rounding, same_on_any_threads, wide};
use half::{bf16, f16};
use pmetal_cpu::{
    Element, HeadAngles, LayerNormStatistics, add_rms_norm_forward, layer_norm_backward, layer_norm_forward,
    layer_norm_weight_gradient, rms_norm_backward, rms_norm_forward, rms_norm_rope_backward, rms_norm_rope_forward,
    uniform,
};

const EPS: f32 = 1e-3;

/// One normalised row; with `rounded`, as the kernel rounds for the dtype.
fn row<T: Element>(x: &[f64], weight: &[f64], rounded: bool) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let rstd = 1.0 / (mean + f64::from(EPS)).sqrt();
    let round = |n: f64| if rounded { f64::from(T::from_f32(n as f32).to_f32()) } else { n };
    x.iter().zip(weight).map(|(x, w)| round(x * rstd) * w).collect()
}

/// The gradient of `sum(dy * row(x))` by central differences in f64.
fn gradients(dy: &[f64], x: &[f64], weight: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let loss = |x: &[f64], w: &[f64]| row::<f32>(x, w, false).iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>();
    let h = 1e-5;
    let shifted = |v: &[f64], i: usize, by: f64| {
        let mut v = v.to_vec();
        v[i] += by;
        v
    };
    let dx = |i| (loss(&shifted(x, i, h), weight) - loss(&shifted(x, i, -h), weight)) / (2.0 * h);
    let dw = |i| (loss(x, &shifted(weight, i, h)) - loss(x, &shifted(weight, i, -h))) / (2.0 * h);
    ((0..x.len()).map(dx).collect(), (0..x.len()).map(dw).collect())
}

fn check<T: Element, W: Element>(rows: usize, width: usize, rounds: bool) {
    let n = rows * width;
    let (x, residual, dy, dsum) = (numbers::<T>(n, 1), numbers::<T>(n, 2), numbers::<T>(n, 3), numbers::<T>(n, 4));
    let weight = numbers::<W>(width, 5);
    let (mut sum, mut y, mut rstd) = (vec![T::ZERO; n], vec![T::ZERO; n], vec![0.0; rows]);
    add_rms_norm_forward(&x, &residual, &weight, EPS, rounds, width, &mut sum, &mut y, &mut rstd);
    let added: Vec<f64> = wide(&x).iter().zip(wide(&residual)).map(|(a, b)| a + b).collect();
    assert_close("sum", &sum, &added, rounding::<T>(1e-7), 0.0);
    // A value that lies on the border between two roundings may go either way before the product.
    let tolerance = 2.0 * rounding::<T>(1e-6);
    let (sums, weights) = (wide(&sum), wide(&weight));
    let expected: Vec<f64> = sums.chunks(width).flat_map(|x| row::<T>(x, &weights, rounds)).collect();
    assert_close("y", &y, &expected, tolerance, 0.1);

    let (mut plain, mut plain_rstd) = (vec![T::ZERO; n], vec![0.0; rows]);
    rms_norm_forward(&sum, &weight, EPS, rounds, width, &mut plain, &mut plain_rstd);
    assert!(plain == y && plain_rstd == rstd, "both forwards agree");

    let (mut dx, mut dweight) = (vec![T::ZERO; n], vec![0.5; width]);
    rms_norm_backward(&dy, &sum, &weight, &rstd, rounds, width, Some(&dsum), &mut dx, Some(&mut dweight));
    let mut expected_dw = vec![0.5; width];
    let mut expected_dx = Vec::new();
    for ((dy, x), dsum) in wide(&dy).chunks(width).zip(sums.chunks(width)).zip(wide(&dsum).chunks(width)) {
        let (dx, dw) = gradients(dy, x, &weights);
        expected_dx.extend(dx.iter().zip(dsum).map(|(a, b)| a + b));
        expected_dw.iter_mut().zip(dw).for_each(|(sum, dw)| *sum += dw);
    }
    assert_close("dx", &dx, &expected_dx, rounding::<T>(2e-6), 2.0);
    assert_close("dweight", &dweight, &expected_dw, rounding::<T>(2e-6), 1.0);
}

#[test]
fn values_and_gradients() {
    for (width, rounds) in [1, 5, 32, 67, 130].into_iter().flat_map(|width| [true, false].map(|rounds| (width, rounds)))
    {
        check::<f32, f32>(3, width, rounds);
        check::<bf16, bf16>(3, width, rounds);
        check::<f16, f32>(2, width, rounds);
    }
    check::<f32, bf16>(50, 64, true);
    check::<bf16, f32>(50, 64, false);
}

/// The gradient of a rotation is the rotation back, so the norm's own formulas serve for the pair.
fn check_heads<T: Element, W: Element>(tokens: usize, heads: usize, width: usize, rounds: bool) {
    let (rows, half) = (tokens * heads, width / 2);
    let turns: Vec<f64> = (0..tokens * half).map(|i| f64::from(uniform(9, i as u64)) * 6.0).collect();
    let cos: Vec<f32> = turns.iter().map(|a| a.cos() as f32).collect();
    let sin: Vec<f32> = turns.iter().map(|a| a.sin() as f32).collect();
    let turned = |row: usize, x: &[f64], sign: f64| -> Vec<f64> {
        let angle = |i: usize| sign * turns[row / heads * half + i % half];
        let pair = |i: usize| if i < half { -x[i + half] } else { x[i - half] };
        (0..width).map(|i| x[i] * angle(i).cos() + pair(i) * angle(i).sin()).collect()
    };
    let angles = HeadAngles { cos: &cos, sin: &sin, heads };
    let (x, dy, weight) = (numbers::<T>(rows * width, 1), numbers::<T>(rows * width, 2), numbers::<W>(width, 3));
    let (mut y, mut rstd) = (vec![T::ZERO; rows * width], vec![0.0; rows]);
    rms_norm_rope_forward(&x, &weight, EPS, rounds, angles, &mut y, &mut rstd);
    let (mut dx, mut dweight) = (vec![T::ZERO; rows * width], vec![0.5; width]);
    rms_norm_rope_backward(&dy, &x, &weight, &rstd, rounds, angles, &mut dx, Some(&mut dweight));

    let weights = wide(&weight);
    let (mut expected, mut expected_dx, mut expected_dw) = (Vec::new(), Vec::new(), vec![0.5; width]);
    for (i, (x, dy)) in wide(&x).chunks(width).zip(wide(&dy).chunks(width)).enumerate() {
        expected.extend(turned(i, &row::<T>(x, &weights, rounds), 1.0));
        let dnormed = turned(i, dy, -1.0);
        expected_dx.extend(gradients(&dnormed, x, &weights).0);
        // the factor that the weight saw
        let factors = row::<T>(x, &vec![1.0; width], rounds);
        expected_dw.iter_mut().zip(dnormed).zip(factors).for_each(|((sum, dn), n)| *sum += dn * n);
    }
    assert_close("y", &y, &expected, 2.0 * rounding::<T>(1e-6), 0.5);
    assert_close("dx", &dx, &expected_dx, rounding::<T>(2e-6), 2.0);
    assert_close("dweight", &dweight, &expected_dw, rounding::<T>(4e-6), 2.0);
}

#[test]
fn heads_are_normalised_and_turned() {
    let shapes = [(1, 2), (3, 10), (2, 64), (5, 128), (1, 134)];
    for ((heads, width), rounds) in shapes.into_iter().flat_map(|shape| [true, false].map(|rounds| (shape, rounds))) {
        check_heads::<f32, f32>(3, heads, width, rounds);
        check_heads::<bf16, bf16>(3, heads, width, rounds);
        check_heads::<f16, f32>(2, heads, width, rounds);
    }
    check_heads::<bf16, bf16>(90, 2, 96, true);
}

#[test]
fn threads_do_not_matter() {
    let (rows, width, rounds) = (300, 256, true);
    let x = numbers::<bf16>(rows * width, 1);
    let weight = numbers::<bf16>(width, 2);
    same_on_any_threads(|| {
        let (mut y, mut rstd) = (x.clone(), vec![0.0; rows]);
        rms_norm_forward(&x, &weight, EPS, rounds, width, &mut y, &mut rstd);
        let (mut dx, mut dweight) = (x.clone(), vec![0.0; width]);
        rms_norm_backward(&y, &x, &weight, &rstd, rounds, width, None, &mut dx, Some(&mut dweight));
        let (heads, half) = (2, 64);
        let turns = vec![0.6f32; rows * half];
        let angles = HeadAngles { cos: &turns, sin: &turns, heads };
        let (mut turned, mut head_rstd) = (x.clone(), vec![0.0; rows * heads]);
        rms_norm_rope_forward(&x, &weight[..2 * half], EPS, rounds, angles, &mut turned, &mut head_rstd);
        let (mut dhead, mut dhead_weight) = (x.clone(), vec![0.0; 2 * half]);
        let dweights = Some(&mut dhead_weight[..]);
        rms_norm_rope_backward(&turned, &x, &weight[..2 * half], &head_rstd, rounds, angles, &mut dhead, dweights);
        ((y, rstd, dx, dweight), (turned, dhead, dhead_weight))
    });
}

#[test]
fn layer_norms_do_not_depend_on_threads() {
    let (rows, heads, width) = (90, 3, 96);
    let x = numbers::<bf16>(rows * heads * width, 1);
    let [weight, bias] = [2, 3].map(|seed| numbers::<bf16>(heads * width, seed));
    same_on_any_threads(|| {
        let (mut y, mut mean, mut rstd) = (x.clone(), vec![0.0; rows * heads], vec![0.0; rows * heads]);
        layer_norm_forward(&x, &weight, Some(&bias), EPS, width, &mut y, &mut mean, &mut rstd);
        let statistics = LayerNormStatistics { mean: &mean, rstd: &rstd };
        let (mut dx, mut dweight) = (x.clone(), vec![0.0; heads * width]);
        layer_norm_backward(&y, &x, &weight, statistics, width, &mut dx);
        layer_norm_weight_gradient(&y, &x, statistics, width, &mut dweight);
        (y, dx, dweight)
    });
}

/// The variance is that of what lies beside the mean, however far the mean is from 0.
#[test]
fn a_layer_norm_far_from_zero() {
    const WIDTH: usize = 67;
    let x: Vec<f32> = numbers::<f32>(3 * WIDTH, 1).iter().map(|x| x + 1000.0).collect();
    let (weight, mut y, mut mean, mut rstd) = (vec![1f32; WIDTH], x.clone(), vec![0.0; 3], vec![0.0; 3]);
    layer_norm_forward(&x, &weight, None, EPS, WIDTH, &mut y, &mut mean, &mut rstd);
    let mut expected = Vec::new();
    for x in wide(&x).chunks(WIDTH) {
        let mean = x.iter().sum::<f64>() / WIDTH as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / WIDTH as f64;
        expected.extend(x.iter().map(|x| (x - mean) / (variance + f64::from(EPS)).sqrt()));
    }
    // the mean is right to its last digit
    assert_close("y", &y, &expected, 4e-4, 1.0);
}
