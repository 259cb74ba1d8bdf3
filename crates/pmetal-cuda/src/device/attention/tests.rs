//! Our kernels against the formula in f64. Where there is no GPU, each test says that it is left out.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device};
use pmetal_metal::{Reach, Result};

use super::{
    super::{
        CudaGpu,
        attention_case::{Case, error, host},
        cuda, open,
    },
    Attention,
};

fn device() -> Option<(Device, Arc<CudaGpu>)> {
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
    Some((device, gpu))
}

fn run(case: &Case, gpu: &CudaGpu, attention: &Attention) -> Result<()> {
    let ([q, k, v, dout], [out, dq, dk, dv]) = (&case.inputs, &case.outputs);
    let stats = attention.forward(gpu, [q, k, v], out, &case.rows, &case.spec)?.expect("heads of such a width");
    attention.backward(gpu, dout, [q, k, v], out, &stats, [dq, dk, dv], &case.rows, &case.spec)
}

fn check(case: &Case, gpu: &CudaGpu, attention: &Attention) -> Result<()> {
    run(case, gpu, attention)?;
    let dtype = case.outputs[0].dtype();
    // an output is rounded once, from weights that were rounded once: half a step of the mantissa each
    let tolerance = if dtype == DType::BF16 { 4e-3 } else { 5e-4 };
    for ((name, got), expected) in ["out", "dq", "dk", "dv"].into_iter().zip(&case.outputs).zip(case.expected()) {
        let error = error(&host(got)?, &expected);
        assert!(error < tolerance, "{name} of {:?} in {dtype:?}: {error:e}", case.spec);
    }
    Ok(())
}

#[test]
fn packed_rows_are_those_of_the_formula() -> Result<()> {
    let Some((device, gpu)) = device() else { return Ok(()) };
    let attention = Attention::default();
    // each is compiled anew, which takes seconds
    for (heads, lengths, dtype) in [
        ([4, 2, 128], &[130, 1, 0, 64, 257, 128][..], DType::BF16),
        ([9, 3, 104], &[300, 65], DType::F16),
        ([6, 2, 64], &[300, 7], DType::F16),
        ([8, 1, 80], &[77; 9], DType::BF16),
        ([3, 1, 8], &[100, 33], DType::BF16),
    ] {
        check(&Case::new(lengths, heads, dtype, &device)?, &gpu, &attention)?;
    }
    Ok(())
}

/// Windows and chunks that begin within tiles and with them, in rows shorter and longer than they, packed and behind a cache.
#[test]
fn queries_that_see_some_of_the_keys() -> Result<()> {
    let Some((device, gpu)) = device() else { return Ok(()) };
    let attention = Attention::default();
    // of fewer keys in a window, what rounding the result does to the gradients is beyond the tolerance
    let reaches = [
        Reach::Window(5),
        Reach::Window(33),
        Reach::Window(64),
        Reach::Window(200),
        Reach::Chunk(7),
        Reach::Chunk(128),
        Reach::Chunk(150),
    ];
    for (heads, dtype) in [([4, 2, 128], DType::BF16), ([3, 1, 72], DType::F16), ([6, 2, 64], DType::BF16)] {
        for reach in reaches {
            for lengths in [&[[420, 420], [1, 1], [0, 0], [40, 40], [129, 129]][..], &[[5, 500], [130, 300], [1, 70]]] {
                let mut case = Case::of(lengths, heads, dtype, &device)?;
                case.spec.reach = reach;
                check(&case, &gpu, &attention)?;
            }
        }
    }
    Ok(())
}

#[test]
fn scores_with_a_cap() -> Result<()> {
    let Some((device, gpu)) = device() else { return Ok(()) };
    let attention = Attention::default();
    for (heads, dtype, reach, cap) in [
        ([4, 2, 128], DType::BF16, Reach::All, 1.0),
        ([4, 2, 128], DType::F16, Reach::All, 30.0),
        ([3, 1, 72], DType::F16, Reach::Window(100), 2.0),
        ([6, 2, 64], DType::BF16, Reach::All, 0.5),
        ([6, 2, 64], DType::F16, Reach::Chunk(90), 1.0),
    ] {
        let mut case = Case::of(&[[300, 300], [33, 33], [70, 200]], heads, dtype, &device)?;
        (case.spec.reach, case.spec.softcap) = (reach, Some(cap));
        check(&case, &gpu, &attention)?;
    }
    Ok(())
}

#[test]
fn the_same_bits_come_every_time() -> Result<()> {
    let Some((device, gpu)) = device() else { return Ok(()) };
    let attention = Attention::default();
    let case = Case::new(&[1000, 500, 700], [8, 4, 128], DType::BF16, &device)?;
    let again = || {
        run(&case, &gpu, &attention)?;
        case.outputs.iter().map(host).collect::<Result<Vec<_>>>()
    };
    let first = again()?;
    for _ in 0..5 {
        assert_eq!(first, again()?);
    }
    Ok(())
}
