//! Copies of consecutive rows into places of a larger tensor: how keys and values enter their cache.

use candle_core::Tensor;

use crate::{
    Error, Result,
    kernel::{View, for_dtype, has_cpu_kernel, with_slice_mut},
};

const OP: &str = "write_rows";

/// Writes the rows of `x [n, ..]` into `target [places, ..]` in place: for each run `(start, len)` the next `len` rows of `x` go to the
/// places from `start` on. Nothing is recorded: no gradient flows through a cache.
///
/// # Errors
/// Where a run lies outside the target, or the runs do not use up `x`.
pub fn write_rows(x: &Tensor, target: &Tensor, runs: &[(usize, usize)]) -> Result<()> {
    check(x, target, runs)?;
    if !has_cpu_kernel(target) {
        return by_candle(x, target, runs);
    }
    let width: usize = x.dims().iter().skip(1).product();
    let x = x.contiguous()?;
    let view = View::of_tensor(&x, OP)?;
    for_dtype!(OP, x.dtype(), T => {
        let mut rest = view.slice::<T>()?;
        with_slice_mut::<T, _>(target, OP, |target| {
            for &(start, len) in runs {
                let (run, tail) = rest.split_at(len * width);
                target[start * width..][..len * width].copy_from_slice(run);
                rest = tail;
            }
        })
    })
}

fn check(x: &Tensor, target: &Tensor, runs: &[(usize, usize)]) -> Result<()> {
    if x.dims().get(1..) != target.dims().get(1..) || x.dtype() != target.dtype() {
        return Err(Error::operand(OP, "rows", (target.dims(), target.dtype()), (x.dims(), x.dtype())));
    }
    let (rows, places) = (x.dim(0)?, target.dim(0)?);
    let total: usize = runs.iter().map(|&(_, len)| len).sum();
    if total != rows {
        return Err(Error::Lengths { op: OP, reason: format!("runs hold {total} rows, there are {rows}") });
    }
    match runs.iter().find(|&&(start, len)| start + len > places) {
        Some(run) => Err(Error::Lengths { op: OP, reason: format!("run {run:?} does not fit {places} places") }),
        None => Ok(()),
    }
}

fn by_candle(x: &Tensor, target: &Tensor, runs: &[(usize, usize)]) -> Result<()> {
    let mut next = 0;
    for &(start, len) in runs.iter().filter(|(_, len)| *len > 0) {
        target.slice_set(&x.narrow(0, next, len)?.contiguous()?, 0, start)?;
        next += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn runs_go_to_their_places() {
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let x = Tensor::arange(1f32, 7.0, &Device::Cpu).unwrap().reshape((3, 2)).unwrap().to_dtype(dtype).unwrap();
            let target = Tensor::zeros((6, 2), dtype, &Device::Cpu).unwrap();
            write_rows(&x, &target, &[(4, 1), (2, 0), (0, 2)]).unwrap();
            let got = target.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(got, [[3.0, 4.0], [5.0, 6.0], [0.0; 2], [0.0; 2], [1.0, 2.0], [0.0; 2]]);
        }
    }

    #[test]
    fn runs_outside_the_target_are_refused() {
        let zeros = |n: usize| Tensor::zeros((n, 2), DType::F32, &Device::Cpu).unwrap();
        assert!(write_rows(&zeros(2), &zeros(3), &[(2, 2)]).is_err());
        assert!(write_rows(&zeros(2), &zeros(3), &[(0, 1)]).is_err());
        assert!(write_rows(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap(), &zeros(3), &[(0, 2)]).is_err());
    }
}
