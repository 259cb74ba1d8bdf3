//! What is Metal's own, on a Mac; the kernels themselves are `pmetal doctor`'s and the emulator's.

use candle_core::{DType, Device, Storage, Tensor};

use super::{exact, exact_zeros, gpu, open};
use crate::{Gemm, Gpu, Grid, kernels};

/// None on a machine without a Metal device, where there is nothing to test.
fn device() -> Option<(Device, std::sync::Arc<dyn Gpu>)> {
    let device = open().inspect_err(|e| eprintln!("not tested: {e}")).ok()?;
    let gpu = gpu(device.as_metal_device().unwrap()).unwrap();
    Some((device, gpu))
}

/// Eighths of -4 ..= 3, exact in every dtype.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + seed * 11) % 57) as f32 / 8.0 - 4.0).collect()
}

fn host(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn products_in_all_layouts() {
    let Some((device, gpu)) = device() else { return };
    let (m, n, k) = (19, 35, 50);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for case in 0..16 {
            let (a_transposed, b_transposed, scaled, into_f32) =
                (case & 1 > 0, case & 2 > 0, case & 4 > 0, case & 8 > 0);
            let (alpha, beta) = if scaled { (0.5, 2.0) } else { (1.0, 0.0) };
            let (a, b, c) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * n, 3));
            let tensor = |data: &[f32], rows: usize, columns: usize, dtype: DType| {
                // behind another row, so that it does not begin its buffer
                let padded: Vec<f32> = vec![0.0; columns].into_iter().chain(data.iter().copied()).collect();
                let whole = Tensor::from_vec(padded, (rows + 1, columns), &Device::Cpu).unwrap();
                let whole = exact(&whole.to_dtype(dtype).unwrap(), &device).unwrap();
                if scaled {
                    whole.narrow(0, 1, rows).unwrap()
                } else {
                    whole.narrow(0, 1, rows).unwrap().force_contiguous().unwrap()
                }
            };
            let c_dtype = if into_f32 { DType::F32 } else { dtype };
            let a_shape = if a_transposed { (k, m) } else { (m, k) };
            let b_shape = if b_transposed { (n, k) } else { (k, n) };
            let (a_t, b_t) = (tensor(&a, a_shape.0, a_shape.1, dtype), tensor(&b, b_shape.0, b_shape.1, dtype));
            let c_t = tensor(&c, m, n, c_dtype);
            gpu.gemm(&Gemm { a: &a_t, a_transposed, b: &b_t, b_transposed, c: &c_t, alpha, beta }).unwrap();
            let got = host(&c_t);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let a_at = |l: usize| if a_transposed { a[l * m + i] } else { a[i * k + l] };
                let b_at = |l: usize| if b_transposed { b[j * k + l] } else { b[l * n + j] };
                // sums of multiples of 1/64 are exact in f32
                let sum: f32 = (0..k).map(|l| a_at(l) * b_at(l)).sum();
                let want = alpha * sum + beta * c[i * n + j];
                let tolerance = match c_dtype {
                    DType::F32 => 0.0,
                    DType::F16 => 1e-3 * (sum.abs() + want.abs()),
                    _ => 8e-3 * (sum.abs() + want.abs()),
                };
                let error = (got[i * n + j] - want).abs();
                assert!(error <= tolerance, "{dtype:?}, case {case}, [{i}, {j}]: {} and not {want}", got[i * n + j]);
            }
        }
    }
}

#[test]
fn launches_see_what_earlier_ones_wrote() {
    let Some((device, gpu)) = device() else { return };
    // more than a command buffer holds, ranges of one buffer, and other kernels' results between
    let arena = exact_zeros(4096, DType::F32, &device).unwrap();
    let (low, high) = (arena.narrow(0, 0, 2048).unwrap(), arena.narrow(0, 2048, 2048).unwrap());
    let ones = Tensor::ones(2048, DType::F32, &device).unwrap();
    let params = kernels::EpilogueParams { n: 2048, width: 2048, pitch: 2048, alpha: 1.0, beta: 1.0 };
    for _ in 0..100 {
        kernels::gemm_epilogue(&*gpu, DType::F32, Grid::cover(2048, 4), &ones, &low, params).unwrap();
        kernels::gemm_epilogue(&*gpu, DType::F32, Grid::cover(2048, 4), &low, &high, params).unwrap();
    }
    let got = host(&arena);
    assert!(got[..2048].iter().all(|&x| x == 100.0), "low: {}", got[0]);
    assert!(got[2048..].iter().all(|&x| x == 5050.0), "high: {}", got[2048]);
}

#[test]
fn buffers_have_their_exact_size() {
    let Some((device, gpu)) = device() else { return };
    let bytes = |t: &Tensor| {
        let (storage, _) = t.storage_and_layout();
        let Storage::Metal(storage) = &*storage else { return 0 };
        storage.buffer().length()
    };
    let data = Tensor::from_vec(numbers(3 * 1000, 1), (3, 1000), &Device::Cpu).unwrap();
    let row = exact(&data.narrow(0, 1, 1).unwrap(), &device).unwrap();
    assert_eq!((bytes(&row), host(&row)), (4000, numbers(3 * 1000, 1)[1000..2000].to_vec()));
    let zeros = exact_zeros(1001, DType::BF16, &device).unwrap();
    assert_eq!((bytes(&zeros), host(&zeros)), (2016, vec![0.0; 1001]));
    assert_eq!(exact(&data.narrow(0, 0, 0).unwrap(), &device).unwrap().dims(), [0, 1000]);
    let memory = gpu.memory().unwrap();
    assert!(0 < memory.live && memory.live <= memory.peak, "{memory:?}");
}

#[test]
fn more_than_the_working_set_is_refused() {
    let Some((device, gpu)) = device() else { return };
    let total = gpu.memory().unwrap().total as usize;
    let refused = exact_zeros(total / 4 + (1 << 20), DType::F32, &device);
    assert!(matches!(refused, Err(crate::Error::OutOfMemory { .. })), "{:?}", refused.map(|t| t.shape().clone()));
}
