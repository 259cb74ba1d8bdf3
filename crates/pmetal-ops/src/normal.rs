//! Random numbers made where they are needed.

use candle_core::{DType, Device, Shape, Tensor};
use pmetal_metal::{exact_zeros, kernels};

use crate::{
    Result,
    elementwise::span,
    place::{gpu_of, is_off},
};

const OP: &str = "normal";

/// A tensor on a GPU whose element `i` is [`random::normal`](crate::random::normal) of `seed` and `i`, but for rounding in f32, times `std`;
/// none on the CPU, and for dtypes without kernels.
///
/// # Errors
/// Where the device fails or has no room.
pub fn normal_on_gpu(shape: &Shape, seed: u64, std: f32, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
    let Some(gpu) = gpu_of(device)?.filter(|_| matches!(dtype, DType::F32 | DType::BF16 | DType::F16) && !is_off(OP))
    else {
        return Ok(None);
    };
    let y = exact_zeros(shape.clone(), dtype, device)?;
    let (n, quads, grid) = span(&[&y]);
    let params = kernels::NormalParams { n, seed, std, aligned: u32::from(quads > 0) };
    kernels::normal(&*gpu, dtype, grid, &y, params)?;
    Ok(Some(y))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{random, testing::emulated};

    #[test]
    fn numbers_are_those_of_the_cpu() {
        assert!(normal_on_gpu(&Shape::from(3), 7, 1.0, DType::F32, &Device::Cpu).unwrap().is_none());
        for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            let got =
                emulated(|| normal_on_gpu(&Shape::from((3, 1367)), 7, 0.5, dtype, &Device::Cpu).unwrap().unwrap());
            let got: Vec<f32> = got.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(got.len(), 4101);
            for (i, got) in got.into_iter().enumerate() {
                let want = 0.5 * random::normal(7, i as u64);
                assert!((got - want).abs() <= tolerance * want.abs().max(0.1), "{i}: {got}, on the CPU {want}");
            }
        }
    }
}
