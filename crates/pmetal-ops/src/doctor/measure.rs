//! How long things take.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};
use serde::Serialize;

use super::{
    checks::Prepared,
    compare::{random, roots},
};
use crate::{
    LinearGroup, LinearMember, Result, Value, Weight, device::synchronize, elementwise, gradients, place::gpu_of,
};

/// How long one figure is measured for, roughly.
const PATIENCE: Duration = Duration::from_millis(30);

/// Microseconds of a call, of several in a row, after one that is not counted.
fn microseconds(device: &Device, call: impl Fn() -> Result<()>) -> Result<f64> {
    call()?;
    synchronize(device)?;
    let once = Instant::now();
    call()?;
    synchronize(device)?;
    let calls = (PATIENCE.as_secs_f64() / once.elapsed().as_secs_f64()).clamp(1.0, 1000.0) as u32;
    let started = Instant::now();
    (0..calls).try_for_each(|_| call())?;
    synchronize(device)?;
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(calls))
}

/// Microseconds of an operation's forward; and of forward and backward, where it has one.
pub(super) fn times(device: &Device, ready: &Prepared) -> Result<(f64, Option<f64>)> {
    let forward = || (ready.forward)(&ready.leaves);
    let alone = microseconds(device, || forward().map(drop))?;
    let leaves: Vec<&Value> = ready.leaves.iter().collect();
    let arriving: Vec<Tensor> = roots(forward()?)?.into_iter().map(|(_, dy)| dy).collect();
    if arriving.is_empty() {
        return Ok((alone, None));
    }
    let both = microseconds(device, || {
        let outputs = forward()?.into_iter().filter(Value::requires_grad);
        gradients(outputs.zip(arriving.iter().cloned()).collect(), &leaves).map(drop)
    })?;
    Ok((alone, Some(both)))
}

/// A matrix product, a copy and a reading, large enough to fill the device.
#[derive(Clone, Debug, Serialize)]
pub struct Rates {
    /// The product's dtype.
    pub product_dtype: &'static str,
    /// The product's rows, columns and inner width.
    pub product_shape: [usize; 3],
    /// Floating-point operations of the product, 10^12 a second.
    pub teraflops: f64,
    /// Bytes that the copy reads, and writes again.
    pub copy_bytes: usize,
    /// Bytes read and written, 10^9 a second.
    pub copy_gigabytes_per_second: f64,
    /// Bytes read where next to nothing is written, 10^9 a second; of a GPU.
    pub read_gigabytes_per_second: Option<f64>,
}

/// Measures them; bf16 and sizes of training on a GPU, a small product in f32 on the CPU.
pub(super) fn rates(device: &Device) -> Result<Rates> {
    let (dtype, [m, n, k], copied) = match device {
        Device::Cpu => (DType::F32, [512, 1024, 1024], 16 << 20),
        _ => (DType::BF16, [8192, 8192, 8192], 128 << 20),
    };
    // numbers repeat along a row: drawing all of them would take longer than all that is measured
    let operand = |rows, seed| -> Result<Tensor> {
        let part = random(&[rows, k / 16], seed)?.to_dtype(DType::F32)?.to_dtype(dtype)?.to_device(device)?;
        Ok(part.repeat((1, 16))?)
    };
    let x = Value::constant(operand(m, 1)?);
    let weight = Weight::Frozen(operand(n, 2)?);
    let group = LinearGroup::new(vec![LinearMember { weight, bias: None, adapter: None }])?;
    let product = microseconds(device, || group.forward(&x, None).map(drop))?;
    drop((x, group));
    let [from, to] = [0, 1].map(|_| Tensor::zeros(copied, dtype, device));
    let (from, to) = (from?, to?);
    let copy = microseconds(device, || elementwise::convert_into(&from, &to))?;
    drop((from, to));
    let copy_bytes = copied * dtype.size_in_bytes();
    Ok(Rates {
        product_dtype: dtype.as_str(),
        product_shape: [m, n, k],
        teraflops: 2.0 * (m * n * k) as f64 / product / 1e6,
        copy_bytes,
        copy_gigabytes_per_second: 2.0 * copy_bytes as f64 / copy / 1e3,
        read_gigabytes_per_second: gpu_of(device)?.map(|gpu| reading(&*gpu, device)).transpose()?,
    })
}

/// The norm of many gradients reads them and writes one sum for each threadgroup.
fn reading(gpu: &dyn Gpu, device: &Device) -> Result<f64> {
    // so much that neither the launch nor a cache counts, and a sixteenth of what is free at most
    let memory = gpu.memory()?;
    let room = usize::try_from(memory.total.saturating_sub(memory.live) / 64).unwrap_or(usize::MAX);
    let (n, groups) = if device.is_cpu() { (1 << 16, 4) } else { (room.min(1 << 30), 2048) };
    let x = Tensor::zeros(n, DType::F32, device)?;
    let sums = empty(groups, DType::F32, device)?;
    let params = kernels::NormParams { n: n as u64 };
    let grid = Grid::line(groups, 256);
    let call = || Ok(kernels::grad_norm_partials(gpu, DType::F32, grid, &x, &sums, params)?);
    Ok(4.0 * n as f64 / microseconds(device, call)? / 1e3)
}
