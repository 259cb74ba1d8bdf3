//! Our kernels against the formula in f64. Where there is no GPU, each test says that it is left out.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device};
use pmetal_metal::Result;

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
        // an output is rounded once, from weights that were rounded once: half a step of the mantissa each
        let tolerance = if dtype == DType::BF16 { 4e-3 } else { 5e-4 };
        let case = Case::new(lengths, heads, dtype, &device)?;
        run(&case, &gpu, &attention)?;
        for ((name, got), expected) in ["out", "dq", "dk", "dv"].into_iter().zip(&case.outputs).zip(case.expected()) {
            let error = error(&host(got)?, &expected);
            assert!(error < tolerance, "{name} of {heads:?} in {dtype:?}: {error:e}");
        }
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
