//! Three mistakes put into texts that GPUs run: a missing barrier, a wrong address space, an off-by-one at a tail. Each is caught, where
//! the text as it stands computes what it should.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::{Emulator, launched};
use pmetal_metal::{
    Grid, Result,
    kernels::{self, ALL, TEXTS},
};

const FILE: &str = "optimizer.metal";

/// The file with `from` turned to `to` in its first place.
fn changed(from: &str, to: &str) -> Emulator {
    let text = TEXTS.iter().find(|(name, _)| *name == FILE).unwrap().1;
    let wrong = text.replacen(from, to, 1);
    assert_ne!(text, wrong, "{FILE} has no {from}");
    Emulator::of(FILE, &wrong, ALL)
}

/// The sum of the squares of 1, 2, 3, 1, 2, 3, … by two threadgroups of four SIMD groups.
fn sum_of_squares(emulator: &Emulator, n: usize) -> Result<()> {
    let grads = Tensor::from_iter((0..n).map(|i| (i % 3) as f32 + 1.0), &Device::Cpu)?;
    let partials = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
    let params = kernels::NormParams { n: n as u64 };
    kernels::grad_norm_partials(emulator, DType::F32, Grid::line(2, 128), &grads, &partials, params)?;
    let expected: usize = (0..n).map(|i| (i % 3 + 1) * (i % 3 + 1)).sum();
    assert_eq!(partials.to_vec1::<f32>()?.iter().sum::<f32>(), expected as f32);
    Ok(())
}

/// A step of AdamW from zeros, whose values move against the sign of their gradients.
fn adamw(emulator: &Emulator, n: usize) -> Result<()> {
    let grads = Tensor::full(-2.0f32, n, &Device::Cpu)?;
    let outcome = Tensor::new(&[0.0f32, 1.0, 1.0, 0.0], &Device::Cpu)?;
    let state = Tensor::zeros((3, n), DType::F32, &Device::Cpu)?;
    let params = kernels::AdamWParams {
        n: n as u64,
        decay: 1.0,
        weight1: 0.5,
        beta2: 0.5,
        weight2: 0.5,
        step_size: 0.25,
        correction2: 1.0,
        eps: 0.0,
        grad_scale: 1.0,
    };
    kernels::adamw(emulator, DType::F32, Grid::cover(n, 4), &grads, &outcome, &state, params)?;
    let expected = [-0.25f32 * (-1.0 / 2.0f32.sqrt()), -1.0, 2.0];
    for (row, expected) in state.to_vec2::<f32>()?.iter().zip(expected) {
        assert!(row.iter().all(|v| (v - expected).abs() < 1e-6), "{row:?}, expected {expected}");
    }
    Ok(())
}

#[track_caller]
fn caught(result: Result<()>, words: &[&str]) {
    let message = result.expect_err("nobody caught it").to_string();
    assert!(words.iter().any(|words| message.contains(words)), "{message}\nexpected one of {words:?}");
}

#[test]
fn the_text_as_it_stands_passes() {
    let emulator = Emulator::new();
    for n in [1, 4, 7, 1027, 9001] {
        sum_of_squares(&emulator, n).unwrap();
        adamw(&emulator, n).unwrap();
    }
    for kernel in ["grad_norm_partials", "adamw"] {
        assert!(launched().contains(&(kernel, DType::F32)));
    }
}

#[test]
fn a_missing_barrier_is_caught() {
    for barrier in ["", "SIMD_BARRIER();"] {
        let emulator = changed("BARRIER();", barrier);
        caught(sum_of_squares(&emulator, 1027), &["race: it reads threadgroup memory partial", "nothing has written"]);
    }
}

#[test]
fn a_wrong_address_space_is_caught() {
    let emulator = changed("THREADGROUP_PTR(float) partial", "DEVICE_PTR(float) partial");
    caught(sum_of_squares(&emulator, 1027), &["optimizer.metal does not compile"]);
    let emulator = changed("WRITE(float, partials, 1)", "READ(float, partials, 1)");
    caught(sum_of_squares(&emulator, 1027), &["optimizer.metal does not compile"]);
}

#[test]
fn an_off_by_one_at_a_tail_is_caught() {
    let emulator = changed("tail < params.n", "tail <= params.n");
    caught(sum_of_squares(&emulator, 1027), &["reads grads[1027], which has 1027 elements"]);
    let emulator = changed("i < quads; i += stride", "i <= quads; i += stride");
    caught(sum_of_squares(&emulator, 1027), &["which has 1027 elements"]);
    // Behind a row of the state lies the next, which is another thread's; behind the last one nothing.
    let emulator = changed("i < n; i += GRID_THREADS", "i <= n; i += GRID_THREADS");
    caught(adamw(&emulator, 7), &["race", "reads grads[7]", "reads state[21]"]);
}
