//! What a CUDA device does, against the CPU. Without the feature or a GPU each test says that it is left out.

mod common;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use pmetal_metal::{Error, Gemm, Gpu, Grid, Result, empty, kernels};

use self::common::{gpu, host, numbers};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A matrix on the device that begins `skip` elements behind an aligned place, and its numbers as rounded.
fn matrix(dims: (usize, usize), dtype: DType, skip: usize, seed: u64, device: &Device) -> Result<(Tensor, Vec<f64>)> {
    let n = dims.0 * dims.1;
    let tensor = upload(n + skip, dtype, seed, device)?.narrow(0, skip, n)?.reshape(dims)?;
    Ok((tensor.clone(), host(&tensor)?))
}

/// `n` numbers on the device; candle's casts know no empty tensors there.
fn upload(n: usize, dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
    if n == 0 {
        return empty(0, dtype, device);
    }
    Ok(Tensor::from_vec(numbers(n, seed), n, device)?.to_dtype(dtype)?)
}

fn add_assign(gpu: &dyn Gpu, x: &Tensor, y: &Tensor) -> Result<()> {
    let n = x.elem_count() as u64;
    let params = kernels::ElementwiseParams { n, quads: n / 4 };
    kernels::add_assign(gpu, x.dtype(), Grid::cover(n as usize, 4), x, y, params)
}

#[test]
fn kernels_run_in_every_dtype_and_size() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    for dtype in DTYPES {
        for n in [0, 1, 3, 4, 5, 255, 1027, 100_003] {
            let x = upload(n, dtype, 1, &device)?;
            let y = upload(n, dtype, 2, &device)?;
            let cpu = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
            let expected = (cpu(&x)? + cpu(&y)?)?.to_dtype(dtype)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            add_assign(&*gpu, &x, &y)?;
            assert_eq!(cpu(&y)?.to_vec1::<f32>()?, expected, "{n} of {dtype:?}");
        }
    }
    Ok(())
}

/// Rows that a cluster of thread blocks holds, of every size of cluster, and rows that go the shared kernel's way.
#[test]
fn gradients_of_cross_entropy_are_those_of_f64() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let vocabularies = [4099, 16_384, 32_000, 50_257, 65_536, 128_256, 151_936, 262_144];
    let caps = [None, Some(8.0f32)];
    let cases = vocabularies.iter().flat_map(|&vocab| DTYPES.map(|dtype| (vocab, dtype)));
    for ((vocab, dtype), cap) in cases.flat_map(|case| caps.map(|cap| (case, cap))) {
        let labels = [0, vocab - 1, 4096, vocab, 1234];
        let (logits, _) = matrix((labels.len(), vocab), dtype, 0, 7, &device)?;
        let logits = (logits * 6.0)?;
        let before = host(&logits)?;
        let losses = Tensor::zeros(labels.len() + 1, DType::F32, &device)?;
        let sent = Tensor::from_vec(labels.map(|label| label as u32).to_vec(), labels.len(), &device)?;
        let (grid, first, grad_scale) = (Grid::line(labels.len(), 1024), 1, 0.25);
        if let Some(cap) = cap {
            let params = kernels::CappedCrossEntropyParams { vocab: vocab as u32, first, grad_scale, cap };
            kernels::capped_cross_entropy_gradient(&*gpu, dtype, grid, &logits, &sent, &losses, params)?;
        } else {
            let params = kernels::CrossEntropyParams { vocab: vocab as u32, first, grad_scale };
            kernels::cross_entropy_gradient(&*gpu, dtype, grid, &logits, &sent, &losses, params)?;
        }
        let share = |x: f64| cap.map_or(0.0, |cap| (x / f64::from(cap)).tanh());
        let (after, losses) = (host(&logits)?, host(&losses)?);
        let rounding = if dtype == DType::F32 { 1e-5 } else { 5e-3 };
        for (row, (&label, before)) in labels.iter().zip(before.chunks(vocab)).enumerate() {
            let logits: Vec<f64> = before.iter().map(|&x| cap.map_or(x, |cap| f64::from(cap) * share(x))).collect();
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            let (counted, what) = (label < vocab, format!("row {row} of {vocab} of {dtype:?}, cap {cap:?}"));
            let loss = if counted { sum.ln() - logits[label] } else { 0.0 };
            assert!((losses[row + 1] - loss).abs() < 1e-4, "{what}: loss {} for {loss}", losses[row + 1]);
            for (i, (&got, x)) in after[row * vocab..].iter().zip(before).enumerate() {
                let hot = if i == label { 1.0 } else { 0.0 };
                let slope = 1.0 - share(*x).powi(2);
                let want = if counted { 0.25 * slope * (logits[i].exp() / sum - hot) } else { 0.0 };
                // f16 has no numbers below 6e-8
                assert!((got - want).abs() <= rounding * want.abs() + 6e-8, "{what}: {got} for {want} at {i}");
            }
        }
        assert_eq!(losses[0], 0.0);
    }
    Ok(())
}

#[test]
fn halves_are_those_of_the_cpu() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let n = 1 << 16;
    let params = |quads| kernels::ElementwiseParams { n: n as u64, quads };
    let f16s: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let bf16s: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let cases = [
        (Tensor::from_slice(&f16s, n, &device)?, f16s.iter().map(|x| x.to_f32()).collect::<Vec<_>>()),
        (Tensor::from_slice(&bf16s, n, &device)?, bf16s.iter().map(|x| x.to_f32()).collect::<Vec<_>>()),
    ];
    // the single elements and the fours of a kernel have words of their own
    for quads in [0, n as u64 / 4] {
        for (x, expected) in &cases {
            let y = empty(n, DType::F32, &device)?;
            kernels::to_f32(&*gpu, x.dtype(), Grid::cover(n, 4), x, &y, params(quads))?;
            for (got, expected) in y.to_vec1::<f32>()?.into_iter().zip(expected) {
                assert!(
                    got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(),
                    "{got} is not {expected}"
                );
            }
        }
        // every exponent, with mantissas that lie on, below and above the middle of two halves
        let fine: Vec<f32> = (0..n as u32)
            .map(|i| f32::from_bits(i << 16 | [0, 0x8000, 0x7fff, 0x1000, 0xffff][i as usize % 5]))
            .collect();
        let x = Tensor::from_slice(&fine, n, &device)?;
        let params = kernels::ElementwiseParams { n: n as u64, quads };
        let y = empty(n, DType::F16, &device)?;
        kernels::from_f32(&*gpu, DType::F16, Grid::cover(n, 4), &x, &y, params)?;
        for (got, &x) in y.to_vec1::<f16>()?.into_iter().zip(&fine) {
            assert!(got == f16::from_f32(x) || got.is_nan() && x.is_nan(), "{x} became {got}");
        }
        let y = empty(n, DType::BF16, &device)?;
        kernels::from_f32(&*gpu, DType::BF16, Grid::cover(n, 4), &x, &y, params)?;
        for (got, &x) in y.to_vec1::<bf16>()?.into_iter().zip(&fine) {
            assert!(got == bf16::from_f32(x) || got.is_nan() && x.is_nan(), "{x} became {got}");
        }
    }
    Ok(())
}

/// Runs a product and compares it with the same in f64. `skip` elements stand before each matrix.
fn check_product(
    [m, n, k]: [usize; 3],
    [a_transposed, b_transposed]: [bool; 2],
    [dtype, wide]: [DType; 2],
    [alpha, beta]: [f32; 2],
    skip: usize,
    device: &Device,
    gpu: &dyn Gpu,
) -> Result<()> {
    let turned = |(rows, columns), transposed| if transposed { (columns, rows) } else { (rows, columns) };
    let (a, a_host) = matrix(turned((m, k), a_transposed), dtype, skip, 1, device)?;
    let (b, b_host) = matrix(turned((k, n), b_transposed), dtype, skip, 2, device)?;
    let (mut c, c_host) = matrix((m, n), wide, skip, 3, device)?;
    if beta == 0.0 && m * n > 0 {
        // nothing of what lies there may be read
        c = (c * f64::NAN)?;
    }
    gpu.gemm(&Gemm { a: &a, a_transposed, b: &b, b_transposed, c: &c, alpha, beta })?;
    let at = |data: &[f64], rows: usize, columns: usize, transposed: bool, row: usize, column: usize| {
        if transposed { data[column * rows + row] } else { data[row * columns + column] }
    };
    let unit = match wide {
        DType::BF16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        _ => 0.0,
    };
    for (place, got) in host(&c)?.into_iter().enumerate() {
        let (row, column) = (place / n, place % n);
        let terms = (0..k).map(|i| {
            at(&a_host, m, k, a_transposed, row, i) * at(&b_host, k, n, b_transposed, i, column) * f64::from(alpha)
        });
        let (product, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
        let before = if beta == 0.0 { 0.0 } else { f64::from(beta) * c_host[place] };
        let expected = product + before;
        // sums are of f32; the library rounds the product of small matrices before it adds what was there, then the sum
        let rounded = expected.abs() + if beta == 0.0 { 0.0 } else { product.abs() };
        let bound = 2e-6 * (size + before.abs()) + unit * rounded + if unit > 0.0 { 1e-7 } else { 0.0 };
        assert!(
            (got - expected).abs() <= bound,
            "{m} x {n} x {k}, transposed {a_transposed} {b_transposed}, {dtype:?} to {wide:?}, {alpha} {beta}, {skip} skipped: \
             {got}, not {expected}"
        );
    }
    Ok(())
}

#[test]
fn products_are_those_of_the_cpu() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let shapes =
        [[1, 1, 1], [7, 5, 3], [16, 16, 16], [33, 17, 129], [130, 16, 256], [16, 256, 77], [0, 4, 3], [4, 0, 3]];
    let factors = [[1.0, 0.0], [0.5, 1.0], [-2.0, 0.25]];
    for dtype in DTYPES {
        for wide in if dtype == DType::F32 { vec![dtype] } else { vec![dtype, DType::F32] } {
            for transposed in [[false, false], [false, true], [true, false], [true, true]] {
                for shape in shapes {
                    for factors in factors {
                        check_product(shape, transposed, [dtype, wide], factors, 0, &device, &*gpu)?;
                    }
                }
                for skip in [1, 2, 8] {
                    check_product([64, 48, 40], transposed, [dtype, wide], [1.0, 1.0], skip, &device, &*gpu)?;
                }
                for factors in factors {
                    check_product([5, 4, 0], transposed, [dtype, wide], factors, 0, &device, &*gpu)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn measuring_a_product_changes_nothing() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    for (k, factors) in [(128, [0.5, 1.0]), (136, [1.0, 0.0])] {
        for wide in [DType::BF16, DType::F32] {
            // the first of a shape is measured, the second finds how
            for _ in 0..2 {
                check_product([512, 256, k], [false, true], [DType::BF16, wide], factors, 0, &device, &*gpu)?;
            }
        }
    }
    Ok(())
}

#[test]
fn operands_that_do_not_fit_are_refused() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let zeros = |rows, columns, dtype| Tensor::zeros((rows, columns), dtype, &device);
    let (a, c) = (zeros(4, 3, DType::BF16)?, zeros(4, 5, DType::BF16)?);
    for (b, c) in [
        (zeros(4, 5, DType::BF16)?, c.clone()),
        (zeros(3, 5, DType::F32)?, c.clone()),
        (zeros(3, 5, DType::BF16)?, zeros(4, 5, DType::F16)?),
        (zeros(3, 5, DType::BF16)?, zeros(5, 4, DType::BF16)?.t()?),
    ] {
        let product = Gemm { a: &a, a_transposed: false, b: &b, b_transposed: false, c: &c, alpha: 1.0, beta: 0.0 };
        assert!(matches!(gpu.gemm(&product), Err(Error::Buffer { kernel: "gemm", .. })));
    }
    let elsewhere = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
    let error = add_assign(&*gpu, &elsewhere, &elsewhere).unwrap_err().to_string();
    assert!(error.contains("another device"), "{error}");
    Ok(())
}

#[test]
fn memory_is_counted_and_its_end_is_recognised() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let mib = 1u64 << 20;
    gpu.synchronize()?;
    let before = gpu.memory()?;
    gpu.reset_peak()?;
    let kept = empty(64 << 20, DType::U8, &device)?;
    drop(empty(32 << 20, DType::U8, &device)?);
    gpu.synchronize()?;
    let after = gpu.memory()?;
    assert_eq!(after.live - before.live, 64 * mib);
    assert_eq!(after.peak - before.live, 96 * mib);
    assert!(after.total > 1 << 30 && after.total.abs_diff(before.total) < 256 * mib, "{after:?} {before:?}");
    drop(kept);
    gpu.synchronize()?;
    assert_eq!(gpu.memory()?.live, before.live);

    let Err(Error::Candle(error)) = empty(usize::try_from(2 * after.total).unwrap(), DType::U8, &device) else {
        panic!("twice the memory was given")
    };
    assert!(pmetal_cuda::is_out_of_memory(&error), "{error}");
    assert!(!pmetal_cuda::is_out_of_memory(&candle_core::Error::Msg("out of memory".into())));
    // and the device goes on
    let x = Tensor::ones(5, DType::F32, &device)?;
    add_assign(&*gpu, &x, &x.copy()?)?;
    gpu.synchronize()
}

#[test]
fn a_captured_step_replays() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let (a, a_host) = matrix((8, 8), DType::BF16, 0, 1, &device)?;
    let sum = Tensor::zeros((8, 8), DType::F32, &device)?;
    let step = || -> Result<()> {
        let one = Tensor::from_slice(&[1f32; 64], (8, 8), &device)?;
        let product = empty((8, 8), DType::F32, &device)?;
        let operands =
            Gemm { a: &a, a_transposed: false, b: &a, b_transposed: true, c: &product, alpha: 1.0, beta: 0.0 };
        gpu.gemm(&operands)?;
        add_assign(&*gpu, &one, &product)?;
        add_assign(&*gpu, &(product * 2.0)?, &sum)
    };
    let graph = pmetal_cuda::capture(&device, step)?;
    for runs in 1..4 {
        let expected: f64 = f64::from(runs) * 2.0 * (a_host[..8].iter().map(|x| x * x).sum::<f64>() + 1.0);
        let got = host(&sum)?[0];
        assert!((got - expected).abs() < 1e-5 * expected, "{runs} runs: {got}, not {expected}");
        graph.replay()?;
    }
    gpu.synchronize()
}

#[test]
fn what_cannot_be_captured_is_told_and_leaves_the_device_well() -> Result<()> {
    let Some((device, gpu, _turn)) = gpu() else { return Ok(()) };
    let x = Tensor::ones(1000, DType::F32, &device)?;
    let works = || -> Result<()> {
        let y = Tensor::zeros(1000, DType::F32, &device)?;
        add_assign(&*gpu, &x, &y)?;
        assert_eq!(y.to_vec1::<f32>()?, vec![1.0; 1000]);
        gpu.synchronize()
    };
    let reads = || -> Result<()> {
        x.to_vec1::<f32>()?;
        Ok(())
    };
    let mut told: Vec<String> = vec![pmetal_cuda::capture(&device, reads).err().unwrap().to_string()];
    works()?;
    let (y, mut before) = (x.copy()?, vec![x.copy()?, x.copy()?]);
    let drops = || -> Result<()> {
        before.pop();
        add_assign(&*gpu, &x, &y)
    };
    told.push(pmetal_cuda::capture(&device, drops).err().unwrap().to_string());
    works()?;
    let mut kept = Vec::new();
    let keeps = || -> Result<()> {
        kept.push(x.copy()?);
        Ok(())
    };
    told.push(pmetal_cuda::capture(&device, keeps).err().unwrap().to_string());
    // what was never made cannot be given back, which is told once
    drop(kept);
    assert!(gpu.synchronize().is_err());
    works()?;
    eprintln!("{}", told.join("\n"));
    Ok(())
}

#[test]
fn devices_that_are_not_there_are_told() {
    let Some((_, gpu, _turn)) = gpu() else { return };
    eprintln!("{:?}", gpu.facts());
    let error = pmetal_cuda::open(99).unwrap_err().to_string();
    assert!(error.starts_with("CUDA device 99: there ") && !error.contains('\n'), "{error}");
}
