//! Copies of consecutive rows into places of a larger tensor: how keys and values enter their cache.

use candle_core::Tensor;
use pmetal_metal::{Gpu, Grid, kernels};

use crate::{
    Error, Result,
    elementwise::{convert_into, rows_in_quads},
    kernel::{View, for_dtype, with_slice_mut},
    place::{Place, place, upload},
    profile,
};

const OP: &str = "write_rows";

/// Writes the rows of `x [n, ..]` into `target [places, ..]` in place: for each run `(start, len)` the next `len` rows of `x` go to the
/// places from `start` on. Nothing is recorded: no gradient flows through a cache.
///
/// # Errors
/// Where a run lies outside the target, or the runs do not use up `x`.
pub fn write_rows(x: &Tensor, target: &Tensor, runs: &[(usize, usize)]) -> Result<()> {
    let _span = profile::span(OP);
    check(x, target, runs)?;
    let x = x.contiguous()?;
    match place(target, OP)? {
        Place::Cpu => on_cpu(&x, target, runs),
        Place::Gpu(gpu) => on_gpu(&*gpu, &x, target, runs),
        Place::Reference => by_candle(&x, target, runs),
    }
}

fn on_cpu(x: &Tensor, target: &Tensor, runs: &[(usize, usize)]) -> Result<()> {
    let width: usize = x.dims().iter().skip(1).product();
    let view = View::of_tensor(x, OP)?;
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

fn on_gpu(gpu: &dyn Gpu, x: &Tensor, target: &Tensor, runs: &[(usize, usize)]) -> Result<()> {
    if let &[(start, len)] = runs {
        return convert_into(x, &target.narrow(0, start, len)?);
    }
    let width: usize = x.dims().iter().skip(1).product();
    let mut table = Vec::with_capacity(3 * runs.len());
    let mut next = 0;
    for &(start, len) in runs {
        table.extend([next, start, len].map(|n| n as u32));
        next += len;
    }
    let longest = runs.iter().map(|&(_, len)| len).max().unwrap_or(0);
    let mut grid = Grid::cover(longest * width, 16);
    grid.groups[1] = runs.len();
    let params = kernels::WriteRowsParams { width: width as u32, aligned: rows_in_quads(width, &[x, target]) };
    Ok(kernels::write_rows(gpu, x.dtype(), grid, x, &upload(&table, x.device())?, target, params)?)
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
    use crate::testing::{emulated, random};

    #[test]
    fn runs_go_to_their_places() {
        small_runs();
        emulated(small_runs);
    }

    #[test]
    fn runs_of_every_width_on_a_gpu() {
        for (width, dtype) in [(1, DType::F32), (17, DType::BF16), (128, DType::F16), (1030, DType::BF16)] {
            let x = random(&[9, width], 1).to_dtype(dtype).unwrap();
            for runs in [vec![(3, 9)], vec![(13, 2), (1, 4), (0, 0), (5, 3)]] {
                let targets = [0, 1].map(|_| random(&[15, width], 2).to_dtype(dtype).unwrap());
                write_rows(&x, &targets[0], &runs).unwrap();
                emulated(|| write_rows(&x, &targets[1], &runs).unwrap());
                let [want, got] = targets.map(|t| t.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap());
                assert_eq!(want, got);
            }
        }
    }

    fn small_runs() {
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
