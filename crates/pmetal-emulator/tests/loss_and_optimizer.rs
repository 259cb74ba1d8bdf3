//! `cross_entropy.metal` and `optimizer.metal` against their formulas in f64.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{Grid, empty, kernels};

const NOT_COUNTED: u32 = u32::MAX;

fn random(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    (0..n as u64).map(|i| scale * (2.0 * pmetal_cpu::uniform(seed, i) - 1.0)).collect()
}

fn tensor(values: &[f32], dtype: DType) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn wide(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_close(what: &str, want: &[f64], got: &Tensor, tolerance: f64) {
    let got = wide(got);
    assert_eq!(want.len(), got.len(), "{what}");
    let scale = want.iter().fold(1e-3f64, |max, x| max.max(x.abs()));
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        assert!((want - got).abs() <= tolerance * scale, "{what} {i}: {got:e}, wanted {want:e}");
    }
}

/// The loss of a row behind a cap, where there is one, and its gradient times `scale`.
fn cross_entropy(row: &[f64], label: u32, scale: f64, cap: Option<f32>) -> (f64, Vec<f64>) {
    if let Some(cap) = cap.map(f64::from) {
        let capped: Vec<f64> = row.iter().map(|x| cap * (x / cap).tanh()).collect();
        let (loss, gradient) = cross_entropy(&capped, label, scale, None);
        return (loss, gradient.iter().zip(capped).map(|(g, x)| g * (1.0 - (x / cap).powi(2))).collect());
    }
    if label == NOT_COUNTED {
        return (0.0, vec![0.0; row.len()]);
    }
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|x| (x - top).exp()).sum();
    let mut gradient: Vec<f64> = row.iter().map(|x| scale * (x - top).exp() / sum).collect();
    gradient[label as usize] -= scale;
    (sum.ln() + top - row[label as usize], gradient)
}

fn check_loss(vocab: usize, dtype: DType, threads: usize, cap: Option<f32>) {
    let gpu = Emulator::new();
    let labels = [vocab as u32 / 2, NOT_COUNTED, 0, vocab as u32 - 1];
    let mut values = random(labels.len() * vocab, vocab as u64, 8.0);
    if vocab > 4 {
        // a masked token, and one that takes it all
        values[1] = f32::NEG_INFINITY;
        values[2 * vocab + 3] = 900.0;
    }
    let logits = tensor(&values, dtype);
    let rows = wide(&logits);
    let want: Vec<_> =
        rows.chunks(vocab).zip(labels).map(|(row, label)| cross_entropy(row, label, 0.25, cap)).collect();
    let mut losses: Vec<f64> = want.iter().map(|(loss, _)| *loss).collect();
    losses.insert(0, 7.0);
    let gradient: Vec<f64> = want.into_iter().flat_map(|(_, gradient)| gradient).collect();

    let what = format!("vocab {vocab}, {dtype:?}, {threads} threads, cap {cap:?}");
    let labels = Tensor::new(&labels, &Device::Cpu).unwrap();
    let grid = Grid::line(4, threads);
    let (vocab, first, grad_scale) = (vocab as u32, 1, 0.25);
    let plain = kernels::CrossEntropyParams { vocab, first, grad_scale };
    let capped = cap.map(|cap| kernels::CappedCrossEntropyParams { vocab, first, grad_scale, cap });
    let got = tensor(&[7.0; 5], DType::F32);
    match capped {
        None => kernels::cross_entropy_loss(&gpu, dtype, grid, &logits, &labels, &got, plain).unwrap(),
        Some(params) => kernels::capped_cross_entropy_loss(&gpu, dtype, grid, &logits, &labels, &got, params).unwrap(),
    }
    assert_close(&format!("loss, {what}"), &losses, &got, 1e-6);
    let got = tensor(&[7.0; 5], DType::F32);
    match capped {
        None => kernels::cross_entropy_gradient(&gpu, dtype, grid, &logits, &labels, &got, plain).unwrap(),
        Some(params) => {
            kernels::capped_cross_entropy_gradient(&gpu, dtype, grid, &logits, &labels, &got, params).unwrap();
        }
    }
    assert_close(&format!("loss beside the gradient, {what}"), &losses, &got, 1e-6);
    // half a unit in the last place
    let rounding = match dtype {
        DType::BF16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        _ => 0.0,
    };
    assert_close(&format!("gradient, {what}"), &gradient, &logits, rounding + 2e-6);
}

#[test]
fn losses_and_gradients_of_rows_of_any_length() {
    for (vocab, threads) in [(1, 32), (3, 64), (5, 32), (130, 32), (1027, 64), (4099, 256), (9000, 1024)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            check_loss(vocab, dtype, threads, None);
            check_loss(vocab, dtype, threads, Some(5.0));
        }
    }
}

#[test]
fn a_logit_that_is_no_number_makes_its_loss_none() {
    let gpu = Emulator::new();
    let logits = tensor(&[0.0, f32::NAN, 1.0, 2.0, 0.0, f32::INFINITY, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0], DType::F32);
    let labels = Tensor::new(&[0u32, 0, 0], &Device::Cpu).unwrap();
    let losses = tensor(&[0.0; 3], DType::F32);
    let params = kernels::CrossEntropyParams { vocab: 4, first: 0, grad_scale: 1.0 };
    kernels::cross_entropy_gradient(&gpu, DType::F32, Grid::line(3, 32), &logits, &labels, &losses, params).unwrap();
    let finite: Vec<bool> = wide(&losses).iter().map(|loss| loss.is_finite()).collect();
    assert_eq!(finite, [false, false, true]);
}

#[test]
fn rows_are_gathered_and_put_back() {
    let gpu = Emulator::new();
    let places = Tensor::new(&[4u32, 0, 3], &Device::Cpu).unwrap();
    for (width, dtype) in [(1, DType::F32), (6, DType::BF16), (8, DType::BF16), (1028, DType::F16), (36, DType::F32)] {
        let x = tensor(&random(5 * width, 1, 1.0), dtype).reshape((5, width)).unwrap();
        let y = empty((3, width), dtype, &Device::Cpu).unwrap();
        let quads = if width % 4 == 0 { width as u32 / 4 } else { 0 };
        let params = kernels::EmbeddingParams { width: width as u32, quads };
        kernels::embedding(&gpu, dtype, Grid::line(3, 64), &x, &places, &y, params).unwrap();
        assert_eq!(wide(&y), wide(&x.index_select(&places, 0).unwrap()), "{width}");
        let back = x.zeros_like().unwrap();
        let params = kernels::ScatterParams { width: width as u32 };
        kernels::scatter_rows(&gpu, dtype, Grid::line(3, 64), &y, &places, &back, params).unwrap();
        let mask = tensor(&[1.0, 0.0, 0.0, 1.0, 1.0], dtype).reshape((5, 1)).unwrap();
        assert_eq!(wide(&back), wide(&x.broadcast_mul(&mask).unwrap()), "{width}");
    }
}

#[test]
fn a_sum_of_any_length() {
    let gpu = Emulator::new();
    for n in [0, 1, 31, 1000, 5003] {
        let x = random(n, 3, 1.0);
        let want = 0.5 * x.iter().map(|&x| f64::from(x)).sum::<f64>();
        let y = empty(1, DType::F32, &Device::Cpu).unwrap();
        let params = kernels::SumParams { n: n as u32, scale: 0.5 };
        kernels::sum_scaled(&gpu, DType::F32, Grid::line(1, 1024), &tensor(&x, DType::F32), &y, params).unwrap();
        assert_close("sum", &[want], &y, 1e-5);
    }
}

/// Norm, clipping factor, whether all is finite, loss.
fn outcome(grads: &Tensor, loss: f32, max_grad_norm: f32) -> Tensor {
    let gpu = Emulator::new();
    let partials = empty(3, DType::F32, &Device::Cpu).unwrap();
    let outcome = empty(4, DType::F32, &Device::Cpu).unwrap();
    let params = kernels::NormParams { n: grads.elem_count() as u64 };
    kernels::grad_norm_partials(&gpu, DType::F32, Grid::line(3, 64), grads, &partials, params).unwrap();
    let params = kernels::FinishParams { partials: 3, max_grad_norm };
    let loss = tensor(&[loss], DType::F32);
    kernels::grad_norm_finish(&gpu, DType::F32, Grid::line(1, 32), &partials, &loss, &outcome, params).unwrap();
    outcome
}

#[test]
fn norms_and_what_follows_from_them() {
    for n in [0, 1, 3, 4, 1000, 4099] {
        let grads = tensor(&random(n, 5, 0.1), DType::F32);
        let norm = wide(&grads).iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_close("no clipping", &[norm, 1.0, 1.0, 2.5], &outcome(&grads, 2.5, 0.0), 1e-6);
        assert_close("a norm below", &[norm, 1.0, 1.0, 2.5], &outcome(&grads, 2.5, 1e3), 1e-6);
        if n > 0 {
            let clip = 1e-3 / (norm + 1e-6);
            assert_close("a norm above", &[norm, clip, 1.0, 2.5], &outcome(&grads, 2.5, 1e-3), 1e-6);
        }
    }
    let finite = |grads: &[f32], loss| wide(&outcome(&tensor(grads, DType::F32), loss, 1.0))[2];
    assert_eq!(finite(&[1.0, 2.0], 0.5), 1.0);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!((finite(&[1.0, bad, 0.0], 0.5), finite(&[1.0], bad)), (0.0, 0.0));
    }
}

/// State and copy after a step of AdamW, as torch.optim.AdamW computes it.
fn step(state: &[f64], grads: &[f64], p: &kernels::AdamWParams, clip: f64) -> Vec<f64> {
    let n = grads.len();
    let (beta1, beta2) = (1.0 - f64::from(p.weight1), f64::from(p.beta2));
    let mut after = state.to_vec();
    for i in 0..n {
        let g = grads[i] * clip;
        let m = beta1 * state[n + i] + (1.0 - beta1) * g;
        let v = beta2 * state[2 * n + i] + f64::from(p.weight2) * g * g;
        let denominator = v.sqrt() / f64::from(p.correction2) + f64::from(p.eps);
        after[i] = state[i] * f64::from(p.decay) - f64::from(p.step_size) * m / denominator;
        (after[n + i], after[2 * n + i]) = (m, v);
    }
    after
}

#[test]
fn adamw_moves_and_rounds_copies_unless_a_number_is_not_finite() {
    let gpu = Emulator::new();
    for n in [1, 3, 4, 1000, 4099] {
        let grads = tensor(&random(n, 6, 0.1), DType::F32);
        let moments = random(2 * n, 8, 0.01).into_iter().map(f32::abs);
        let start: Vec<f32> = random(n, 7, 1.0).into_iter().chain(moments).collect();
        let params = kernels::AdamWParams {
            n: n as u64,
            decay: 0.99,
            weight1: 0.1,
            beta2: 0.999,
            weight2: 0.001,
            step_size: 0.02,
            correction2: 0.04,
            eps: 1e-8,
            grad_scale: 2.0,
        };
        for (finite, clip) in [(1.0, 1.0), (1.0, 0.3), (0.0, 1.0)] {
            let outcome = tensor(&[1.0, clip, finite, 0.0], DType::F32);
            let state = tensor(&start, DType::F32);
            let before = wide(&state);
            let want =
                if finite == 1.0 { step(&before, &wide(&grads), &params, 2.0 * f64::from(clip)) } else { before };
            kernels::adamw(&gpu, DType::BF16, Grid::line(2, 64), &grads, &outcome, &state, params).unwrap();
            assert_close(&format!("{n} values, clip {clip}, finite {finite}"), &want, &state, 1e-6);

            let (copied, copy) = (tensor(&start, DType::F32), tensor(&vec![0.0; n], DType::BF16));
            let params = bytemuck::cast(params);
            kernels::adamw_with_copy(&gpu, DType::BF16, Grid::line(2, 64), &grads, &outcome, &copied, &copy, params)
                .unwrap();
            assert_eq!(wide(&copied), wide(&state));
            let rounded = copied.narrow(0, 0, n).unwrap().to_dtype(DType::BF16).unwrap();
            let want = if finite == 1.0 { wide(&rounded) } else { vec![0.0; n] };
            assert_eq!(wide(&copy), want, "{n} copies");
        }
    }
}
