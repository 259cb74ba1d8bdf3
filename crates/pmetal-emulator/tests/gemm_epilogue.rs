//! `gemm_epilogue.metal`: what is done to a product before it is where it belongs.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{Grid, kernels};

fn run(n: usize, dtype: DType, alpha: f32, beta: f32, old: f32) -> Vec<f32> {
    let product = Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let c = Tensor::full(old, n, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let params = kernels::EpilogueParams { n: n as u64, alpha, beta };
    kernels::gemm_epilogue(&Emulator::new(), dtype, Grid::cover(n, 4), &product, &c, params).unwrap();
    c.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

#[test]
fn scales_and_adds() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // small integers and their halves are exact in every dtype
        let want: Vec<f32> = (0..77).map(|i| 0.5 * i as f32 - 2.0 * 3.0).collect();
        assert_eq!(run(77, dtype, 0.5, -2.0, 3.0), want);
    }
}

#[test]
fn without_beta_the_old_is_not_looked_at() {
    assert_eq!(run(3, DType::F32, 2.0, 0.0, f32::NAN), [0.0, 2.0, 4.0]);
}
