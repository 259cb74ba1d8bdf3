//! `gemm_epilogue.metal`: what is done to a product before it is where it belongs.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{Grid, kernels};

/// The result in `rows` rows of a matrix that is two columns wider.
fn run(rows: usize, n: usize, dtype: DType, alpha: f32, beta: f32, old: f32) -> Vec<f32> {
    let product = Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().reshape((rows, n / rows)).unwrap();
    let wide = Tensor::full(old, (rows, n / rows + 2), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let c = wide.narrow(1, 1, n / rows).unwrap();
    let (width, pitch) = ((n / rows) as u64, (n / rows + 2) as u64);
    let params = kernels::EpilogueParams { n: n as u64, width, pitch, alpha, beta };
    let product = product.to_dtype(dtype).unwrap();
    kernels::gemm_epilogue(&Emulator::new(), dtype, Grid::cover(n, 4), &product, &c, params).unwrap();
    c.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn scales_and_adds() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // small integers and their halves are exact in every dtype
        let want: Vec<f32> = (0..77).map(|i| 0.5 * i as f32 - 2.0 * 3.0).collect();
        assert_eq!(run(7, 77, dtype, 0.5, -2.0, 3.0), want);
    }
}

#[test]
fn without_beta_the_old_is_not_looked_at() {
    assert_eq!(run(1, 3, DType::F32, 2.0, 0.0, f32::NAN), [0.0, 2.0, 4.0]);
}
