//! Three mistakes put into the texts that GPUs run: a missing barrier, a wrong address space, an off-by-one at a tail. Each is caught,
//! where the text as it stands computes what it should.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::{Emulator, launched};
use pmetal_metal::{
    Grid, Result,
    kernels::{self, ALL, TEXTS},
};

const ROWS: usize = 3;

/// The text of a file, with `from` turned to `to` in its first place.
fn changed(file: &'static str, from: &str, to: &str) -> Emulator {
    let text = TEXTS.iter().find(|(name, _)| *name == file).unwrap().1;
    let wrong = text.replacen(from, to, 1);
    assert_ne!(text, wrong, "{file} has no {from}");
    Emulator::of(file, &wrong, ALL)
}

/// RMSNorm of ones times two, in rows of `width` that belong to a threadgroup of two SIMD groups.
fn rms_norm(emulator: &Emulator, width: usize) -> Result<()> {
    let full = |v: f32, shape: &[usize]| Tensor::full(v, shape, &Device::Cpu).unwrap();
    let (x, weight) = (full(2.0, &[ROWS, width]), full(3.0, &[width]));
    let (y, rstd) = (full(0.0, &[ROWS, width]), full(0.0, &[ROWS]));
    let aligned = u32::from(width.is_multiple_of(4));
    let params = kernels::rms_norm::RmsNormParams {
        rows: ROWS as u32,
        width: width as u32,
        simds_per_row: 2,
        aligned,
        eps: 0.0,
    };
    kernels::rms_norm(emulator, DType::F32, Grid::line(ROWS, 64), &x, &weight, &y, &rstd, params)?;
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, vec![3.0; ROWS * width]);
    assert_eq!(rstd.to_vec1::<f32>()?, [0.5; ROWS]);
    Ok(())
}

fn add_assign(emulator: &Emulator, n: usize) -> Result<()> {
    let count = |step: f32| Tensor::from_iter((0..n).map(|i| step * i as f32), &Device::Cpu);
    let (x, y) = (count(1.0)?, count(2.0)?);
    let params = kernels::add_assign::ElementwiseParams { n: n as u64, quads: n as u64 / 4 };
    kernels::add_assign(emulator, DType::F32, Grid::cover(n, 4), &x, &y, params)?;
    assert_eq!(y.to_vec1::<f32>()?, count(3.0)?.to_vec1::<f32>()?);
    Ok(())
}

#[track_caller]
fn caught(result: Result<()>, words: &[&str]) {
    let message = result.expect_err("nobody caught it").to_string();
    assert!(words.iter().any(|words| message.contains(words)), "{message}\nexpected one of {words:?}");
}

#[test]
fn the_texts_as_they_stand_pass() {
    let emulator = Emulator::new();
    for width in [1, 7, 127, 128, 130, 516] {
        rms_norm(&emulator, width).unwrap();
    }
    for n in [1, 5, 1024, 1027] {
        add_assign(&emulator, n).unwrap();
    }
    for kernel in ["rms_norm", "add_assign"] {
        assert!(launched().contains(&(kernel, DType::F32)));
    }
}

#[test]
fn a_missing_barrier_is_caught() {
    let emulator = changed("rms_norm.metal", "BARRIER();", "");
    caught(rms_norm(&emulator, 516), &["race: it reads threadgroup memory sums", "which nothing has written"]);
    let emulator = changed("rms_norm.metal", "BARRIER();", "SIMD_BARRIER();");
    caught(rms_norm(&emulator, 516), &["race: it reads threadgroup memory sums", "which nothing has written"]);
}

#[test]
fn a_wrong_address_space_is_caught() {
    let emulator = changed("rms_norm.metal", "THREADGROUP_PTR(float) sums", "DEVICE_PTR(float) sums");
    caught(rms_norm(&emulator, 516), &["rms_norm.metal does not compile"]);
    let emulator = changed("rms_norm.metal", "rms_norm_store(DEVICE_PTR(T) y", "rms_norm_store(DEVICE_PTR(const T) y");
    caught(rms_norm(&emulator, 516), &["rms_norm.metal does not compile"]);
}

#[test]
fn an_off_by_one_at_a_tail_is_caught() {
    let emulator = changed("elementwise.metal", "i < params.n", "i <= params.n");
    caught(
        add_assign(&emulator, 1027),
        &["reads y[1027], which has 1027 elements", "reads x[1027], which has 1027 elements"],
    );
    // One element of the next row, or behind the last.
    let emulator = changed("rms_norm.metal", "c + 3 < width) y[", "c + 3 <= width) y[");
    caught(rms_norm(&emulator, 127), &["race: it writes y[127]", "writes y[381], which has 381 elements"]);
    let emulator = changed("rms_norm.metal", "c + 2 < width) y[", "c + 3 < width) y[");
    caught(rms_norm(&emulator, 127), &["it never writes y[126]"]);
}
