//! What a launch and an operation cost beside their arithmetic: `cargo bench --bench ffi_overhead`, with `--features cuda` for NVIDIA GPUs.
//!
//! Calls are asked for one behind another and waited for once, so that on a GPU the figure is the larger of what the host and what the
//! device spends on one call.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use pmetal_core::DeviceChoice;
use pmetal_metal::{Grid, kernels};
use pmetal_ops::{LinearGroup, LinearMember, Result, RmsNorm, Value, Weight, device, no_grad, rms_norm};

fn overheads(criterion: &mut Criterion) {
    for choice in [DeviceChoice::Cpu, DeviceChoice::Cuda(0), DeviceChoice::Metal] {
        // a device that is not there, or not in this build, has no figures
        let Ok(device) = device::open(choice) else { continue };
        if let Err(error) = of_device(criterion, &device) {
            eprintln!("{}: {error}", device::name(&device));
        }
    }
}

fn of_device(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let tensor = |shape: &[usize]| Ok::<_, pmetal_ops::Error>(Tensor::ones(shape, DType::F32, device)?);
    let (x, y) = (tensor(&[1])?, tensor(&[1])?);
    bench(criterion, device, "launch of add_assign", || smallest_launch(device, &x, &y));

    let (row, weight) = (Value::variable(tensor(&[1, 64])?), Value::constant(tensor(&[64])?));
    bench(criterion, device, "rms_norm of 1 row", || {
        no_grad(|| rms_norm(&row, &weight, RmsNorm::new(1e-5), 0)).map(drop)
    });
    bench(criterion, device, "rms_norm of 1 row, recorded", || {
        rms_norm(&row, &weight, RmsNorm::new(1e-5), 0).map(drop)
    });

    let member = LinearMember { weight: Weight::Frozen(tensor(&[64, 64])?), bias: None, adapter: None };
    let group = LinearGroup::new(vec![member]).unwrap();
    bench(criterion, device, "linear of 1 row", || no_grad(|| group.forward(&row, None)).map(drop));
    Ok(())
}

/// One element added to another: on a GPU by its kernel's launcher, on the CPU by the function itself.
fn smallest_launch(device: &Device, x: &Tensor, y: &Tensor) -> Result<()> {
    let gpu = match device {
        Device::Cuda(cuda) => pmetal_cuda::gpu(cuda)?,
        Device::Metal(metal) => pmetal_metal::gpu(metal)?,
        Device::Cpu => {
            pmetal_cpu::add_assign(std::hint::black_box(&mut [1f32]), std::hint::black_box(&[1f32]));
            return Ok(());
        }
    };
    let params = kernels::ElementwiseParams { n: 1, quads: 0 };
    Ok(kernels::add_assign_f32(&*gpu, DType::F32, Grid::line(1, 32), x, y, params)?)
}

fn bench(criterion: &mut Criterion, device: &Device, what: &str, call: impl Fn() -> Result<()>) {
    criterion.bench_function(&format!("{}: {what}", device::name(device)), |bencher| {
        bencher.iter_custom(|calls| timed(device, calls, &call).unwrap_or_else(|error| panic!("{what}: {error}")));
    });
}

fn timed(device: &Device, calls: u64, call: impl Fn() -> Result<()>) -> Result<Duration> {
    let started = Instant::now();
    (0..calls).try_for_each(|_| call())?;
    device::synchronize(device)?;
    Ok(started.elapsed())
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).without_plots();
    targets = overheads
}
criterion_main!(benches);
