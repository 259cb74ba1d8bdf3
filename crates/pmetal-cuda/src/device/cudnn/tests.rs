//! cuDNN's attention against the formula in f64. Where there is no GPU or no cuDNN, each test says that it is left out.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device};
use pmetal_metal::{Reach, Result, empty};

use super::{
    super::{
        CudaGpu,
        attention_case::{Case, error, host},
        capture, cuda, open,
    },
    Cudnn, rounded,
};

fn cudnn(deterministic: bool) -> Option<(Device, Arc<CudaGpu>, Cudnn)> {
    let device = match open(0) {
        Ok(device) => device,
        Err(error) => {
            assert!(!Path::new("/dev/nvidiactl").exists(), "{error}");
            eprintln!("left out: {error}");
            return None;
        }
    };
    let Device::Cuda(candle) = &device else { panic!("{device:?} is no CUDA device") };
    let gpu = cuda(candle).unwrap();
    let cudnn = Cudnn::open(&gpu, deterministic).unwrap();
    if cudnn.is_none() {
        eprintln!("left out: no cuDNN here");
    }
    Some((device, gpu, cudnn?))
}

/// Forward and backward; false where cuDNN does not serve.
fn run(case: &Case, gpu: &CudaGpu, cudnn: &Cudnn) -> Result<bool> {
    let ([q, k, v, dout], [out, dq, dk, dv]) = (&case.inputs, &case.outputs);
    let Some(stats) = cudnn.forward(gpu, [q, k, v], out, &case.rows, &case.spec)? else { return Ok(false) };
    cudnn.backward(gpu, dout, [q, k, v], out, &stats, [dq, dk, dv], &case.rows, &case.spec)
}

#[test]
fn packed_rows_are_those_of_the_formula() -> Result<()> {
    for deterministic in [false, true] {
        let Some((device, gpu, cudnn)) = cudnn(deterministic) else { return Ok(()) };
        for (heads, lengths) in [
            ([4, 2, 128], &[130, 1, 0, 64, 257][..]),
            ([6, 2, 64], &[300]),
            ([2, 2, 80], &[40, 128, 3]),
            ([8, 1, 96], &[77; 9]),
            ([2, 1, 256], &[8, 1, 31]),
        ] {
            // an output is rounded once, from weights that were rounded once: half a step of the mantissa each
            for (dtype, tolerance) in [(DType::BF16, 4e-3), (DType::F16, 5e-4)] {
                let case = Case::new(lengths, heads, dtype, &device)?;
                assert!(run(&case, &gpu, &cudnn)?, "{heads:?} in {dtype:?}: cuDNN {} does not serve", cudnn.version());
                for ((name, got), expected) in
                    ["out", "dq", "dk", "dv"].into_iter().zip(&case.outputs).zip(case.expected())
                {
                    let error = error(&host(got)?, &expected);
                    assert!(error < tolerance, "{name} of {heads:?} in {dtype:?}: {error:e}, {deterministic}");
                }
            }
        }
    }
    Ok(())
}

/// In rows shorter and longer than the windows.
#[test]
fn windows_and_caps_are_those_of_the_formula() -> Result<()> {
    for deterministic in [false, true] {
        let Some((device, gpu, cudnn)) = cudnn(deterministic) else { return Ok(()) };
        for (heads, reach, softcap) in [
            ([4, 2, 128], Reach::Window(50), None),
            ([2, 1, 256], Reach::Window(50), None),
            ([2, 2, 256], Reach::Window(128), None),
            ([4, 2, 128], Reach::All, Some(1.5)),
            ([2, 1, 256], Reach::All, Some(30.0)),
            ([2, 1, 256], Reach::Window(50), Some(1.5)),
        ] {
            let mut case = Case::new(&[130, 1, 0, 64, 257], heads, DType::BF16, &device)?;
            (case.spec.reach, case.spec.softcap) = (reach, softcap);
            assert!(run(&case, &gpu, &cudnn)?, "{:?}: cuDNN {} does not serve", case.spec, cudnn.version());
            for ((name, got), expected) in ["out", "dq", "dk", "dv"].into_iter().zip(&case.outputs).zip(case.expected())
            {
                let error = error(&host(got)?, &expected);
                assert!(error < 4e-3, "{name} of {:?}: {error:e}, {deterministic}", case.spec);
            }
        }
    }
    Ok(())
}

#[test]
fn a_deterministic_backward_gives_the_same_bits() -> Result<()> {
    let Some((device, gpu, cudnn)) = cudnn(true) else { return Ok(()) };
    let case = Case::new(&[1000, 500, 700], [8, 4, 64], DType::BF16, &device)?;
    let again = || {
        assert!(run(&case, &gpu, &cudnn)?);
        case.outputs.iter().map(host).collect::<Result<Vec<_>>>()
    };
    let first = again()?;
    for _ in 0..5 {
        assert_eq!(first, again()?);
    }
    Ok(())
}

#[test]
fn a_step_is_captured() -> Result<()> {
    let Some((device, gpu, cudnn)) = cudnn(true) else { return Ok(()) };
    let case = Case::new(&[200, 56], [4, 2, 64], DType::BF16, &device)?;
    let graph = capture(&device, || run(&case, &gpu, &cudnn).map(|served| assert!(served)))?;
    let first = case.outputs.iter().map(host).collect::<Result<Vec<_>>>()?;
    // other results come between
    let mut other = case.clone();
    for input in &mut other.inputs {
        *input = input.contiguous()?.flip(&[0])?;
    }
    assert!(run(&other, &gpu, &cudnn)?);
    assert_ne!(first[0], host(&case.outputs[0])?);
    graph.replay()?;
    assert_eq!(first, case.outputs.iter().map(host).collect::<Result<Vec<_>>>()?);
    Ok(())
}

#[test]
fn what_is_not_served_is_told_by_both() -> Result<()> {
    let Some((device, gpu, cudnn)) = cudnn(false) else { return Ok(()) };
    let mut unpacked = Case::new(&[5, 9], [2, 1, 64], DType::BF16, &device)?;
    unpacked.rows.packed = false;
    let single = Case::new(&[5, 9], [2, 1, 64], DType::F32, &device)?;
    let odd = Case::new(&[5, 9], [2, 1, 20], DType::BF16, &device)?;
    let mut chunked = Case::new(&[5, 9], [2, 1, 256], DType::BF16, &device)?;
    chunked.spec.reach = Reach::Chunk(4);
    for case in [unpacked, single, odd, chunked] {
        let ([q, k, v, dout], [out, dq, dk, dv]) = (&case.inputs, &case.outputs);
        assert!(!run(&case, &gpu, &cudnn)?);
        let stats = empty(1, DType::F32, &device)?;
        assert!(!cudnn.backward(&gpu, dout, [q, k, v], out, &stats, [dq, dk, dv], &case.rows, &case.spec)?);
    }
    Ok(())
}

#[test]
fn few_shapes_serve_all() {
    for n in 1..5000 {
        let up = rounded(n, 128);
        assert!(up >= n && up < n + n.max(512) / 4 && up.is_multiple_of(128), "{n}: {up}");
        assert!((n..=n + n / 4).contains(&rounded(n, 1)), "{n}");
    }
    let lengths: std::collections::HashSet<_> = (1..=8192).map(|n| rounded(n, 128)).collect();
    assert!(lengths.len() < 32, "{}", lengths.len());
}
