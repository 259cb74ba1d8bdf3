//! Numbers to compute with, what comes out, and how far two results lie apart.

use candle_core::{DType, Device, Tensor};

use crate::{Result, Value, gradients};

/// Random numbers are drawn up to here, then again from the first on: large inputs are there at once.
const PERIOD: usize = 1 << 16;

/// Reproducible numbers around zero: f64, on the host.
pub(crate) fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    let n = shape.iter().product::<usize>();
    let drawn: Vec<f64> = (0..n.min(PERIOD)).map(|i| f64::from(pmetal_cpu::normal(seed, i as u64)) * 0.7).collect();
    let data = drawn.iter().copied().cycle().take(n).collect();
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

/// What arrives at output `k` from above: 1 at a scalar, which is a loss; else numbers that differ from place to place and are exact in
/// bf16. f64, on the host.
pub(crate) fn pattern(y: &Tensor, k: usize) -> Result<Tensor> {
    if y.rank() == 0 {
        return Ok(Tensor::new(1f64, &Device::Cpu)?);
    }
    let data: Vec<f64> = (0..y.elem_count()).map(|i| ((i * 7 + k * 3) % 11) as f64 * 0.25 - 1.0).collect();
    Ok(Tensor::from_vec(data, y.shape(), &Device::Cpu)?)
}

/// Outputs with the gradients that arrive at those which have a past.
pub(crate) fn roots(outputs: Vec<Value>) -> Result<Vec<(Value, Tensor)>> {
    let reached = outputs.into_iter().enumerate().filter(|(_, value)| value.requires_grad());
    let roots = reached.map(|(k, value)| {
        let y = value.tensor();
        let dy = pattern(y, k)?.to_dtype(y.dtype())?.to_device(y.device())?;
        Ok((value, dy))
    });
    roots.collect()
}

/// Outputs of an operation, and the gradients of the sum over `k` of `sum(y_k * pattern_k)` in the leaves.
pub(crate) fn results(
    leaves: &[Value],
    op: impl FnOnce(&[Value]) -> Result<Vec<Value>>,
) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let values = op(leaves)?;
    let outputs = values.iter().map(|value| value.tensor().clone()).collect();
    let found = gradients(roots(values)?, &leaves.iter().collect::<Vec<_>>())?;
    let grads = found.into_iter().zip(leaves).map(|(grad, leaf)| match grad {
        Some(grad) => Ok(grad),
        None => Ok(leaf.tensor().zeros_like()?),
    });
    Ok((outputs, grads.collect::<Result<_>>()?))
}

/// The largest difference, relative to the largest magnitude wanted (0.001 at least); infinite where a number is not finite.
pub(crate) fn relative_error(want: &Tensor, got: &Tensor) -> Result<f64> {
    let (want, got) = (host_f64(want)?, host_f64(got)?);
    if want.len() != got.len() || got.iter().any(|x| !x.is_finite()) {
        return Ok(f64::INFINITY);
    }
    let scale = want.iter().fold(1e-3f64, |most, x| most.max(x.abs()));
    Ok(want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / scale)
}

fn host_f64(t: &Tensor) -> Result<Vec<f64>> {
    // not every device has f64
    Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The relative error that the rounding of a dtype explains, over the few roundings of an operation and its backward.
pub(crate) fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 3e-2,
        DType::F16 => 4e-3,
        _ => 2e-5,
    }
}
