//! What tests on a CUDA device share.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Error, Gpu, Result};

/// The first GPU, for one test at a time: they share its memory.
pub fn gpu() -> Option<(Device, Arc<dyn Gpu>, MutexGuard<'static, ()>)> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match pmetal_cuda::open(0) {
        Ok(device) => {
            let Device::Cuda(cuda) = &device else { panic!("{device:?} is no CUDA device") };
            let gpu = pmetal_cuda::gpu(cuda).unwrap();
            Some((device, gpu, turn))
        }
        Err(error) => {
            assert!(matches!(error, Error::NotBuilt { .. }) || !Path::new("/dev/nvidiactl").exists(), "{error}");
            eprintln!("left out: {error}");
            None
        }
    }
}

/// Numbers in -1 .. 1, the same in every run.
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

/// A tensor's numbers.
pub fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f32> = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(values.into_iter().map(f64::from).collect())
}
