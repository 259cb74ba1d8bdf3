//! How fast a device multiplies and exchanges memory with the host.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gemm, Gpu, empty};

use crate::{Result, place::gpu_of};

/// Width of the square matrices that are multiplied.
const WIDTH: usize = 4096;
/// Bytes that are sent to the host.
const SENT: usize = 64 << 20;

/// What a device does in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRates {
    /// Floating-point operations of a large product in bf16.
    pub product: f64,
    /// Bytes that go to the host's memory beside other work.
    pub host: f64,
}

/// Measures the rates in some milliseconds; none for a device without memory of its own.
///
/// # Errors
/// Where the device fails or has no room.
pub fn rates(device: &Device) -> Result<Option<DeviceRates>> {
    let Some(gpu) = gpu_of(device)? else { return Ok(None) };
    let sent = Tensor::zeros(SENT, DType::U8, device)?;
    if gpu.rest(&sent)?.is_none() {
        return Ok(None);
    }
    let host = fastest(&*gpu, || {
        if let Some(mut resting) = gpu.rest(&sent)? {
            resting.leave()?;
        }
        Ok(())
    })?;
    // random numbers: zeros are multiplied faster
    let operand = || Tensor::randn(0f32, 1.0, (WIDTH, WIDTH), device)?.to_dtype(DType::BF16);
    let (a, b) = (operand()?, operand()?);
    let c = empty((WIDTH, WIDTH), DType::BF16, device)?;
    let work = Gemm { a: &a, a_transposed: false, b: &b, b_transposed: true, c: &c, alpha: 1.0, beta: 0.0 };
    let product = fastest(&*gpu, || Ok(gpu.gemm(&work)?))?;
    Ok(Some(DeviceRates { product: 2.0 * (WIDTH as f64).powi(3) / product, host: SENT as f64 / host }))
}

/// Seconds of a call, the least of some, after one that is not counted.
fn fastest(gpu: &dyn Gpu, call: impl Fn() -> Result<()>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for i in 0..4 {
        gpu.synchronize()?;
        let started = Instant::now();
        call()?;
        gpu.synchronize()?;
        if i > 0 {
            least = least.min(started.elapsed().as_secs_f64());
        }
    }
    Ok(least)
}
