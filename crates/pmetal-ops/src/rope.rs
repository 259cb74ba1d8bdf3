//! Rotary position embedding, half-split pairs.
//!
//! Pair `(x_i, x_{i + d/2})` of each head turns by `position * inv_freq_i`; backward turns the gradient the other way.
//! Source: Su et al., "RoFormer", 2021, with the pairing of Hugging Face's Llama.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    kernel::{for_dtype, has_cpu_kernel, with_slice_mut},
};

const OP: &str = "rope";

/// Cosines and sines of every token of a batch, `[tokens, head_dim / 2]` f32.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Angles>);

#[derive(Debug)]
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table for tokens at `positions`, with one frequency per pair and a factor on cosine and sine (1 for plain rope).
    pub fn new(positions: &[u32], inv_freq: &[f32], factor: f32) -> Self {
        let angles = positions.iter().flat_map(|&p| inv_freq.iter().map(move |f| p as f32 * f));
        let (sin, cos) = angles.map(|a| (a.sin() * factor, a.cos() * factor)).unzip();
        Self(Arc::new(Angles { cos, sin, half: inv_freq.len() }))
    }

    fn tensors(&self, dtype: DType, device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
        let tokens = self.0.cos.len() / self.0.half.max(1);
        let read = |data: &[f32]| Tensor::from_slice(data, (tokens, 1, self.0.half), device)?.to_dtype(dtype);
        Ok((read(&self.0.cos)?, read(&self.0.sin)?))
    }
}

/// Turns `x [tokens, heads, head_dim]` by the angles of its tokens.
pub fn rope(x: &Value, table: &RopeTable) -> Result<Value> {
    let (tokens, _, head_dim) = x.tensor().dims3()?;
    if table.0.half * 2 != head_dim || table.0.cos.len() != tokens * table.0.half {
        return Err(Error::operand(OP, "table", [tokens, head_dim / 2], [table.0.cos.len(), table.0.half]));
    }
    let table = table.clone();
    if !has_cpu_kernel(x.tensor()) {
        return Ok(one(composite(&[x], move |t| Ok(vec![reference(&t[0], &table)?]))?));
    }
    let y = turned(x.tensor(), &table, false)?;
    Ok(one(Value::record(vec![y], &[x], move |grads| Ok(vec![Some(turned(&only(grads, OP)?, &table, true)?)]))))
}

fn turned(x: &Tensor, table: &RopeTable, inverse: bool) -> Result<Tensor> {
    let (_, heads, head_dim) = x.dims3()?;
    let y = x.force_contiguous()?;
    for_dtype!(OP, y.dtype(), T => with_slice_mut::<T, _>(&y, OP, |y| {
        pmetal_cpu::rope(y, heads, head_dim, &table.0.cos, &table.0.sin, inverse);
    }))?;
    Ok(y)
}

/// The formula in plain candle.
fn reference(x: &Tensor, table: &RopeTable) -> candle_core::Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (cos, sin) = table.tensors(wide, x.device())?;
    let half = table.0.half;
    let (a, b) = (x.narrow(2, 0, half)?.to_dtype(wide)?, x.narrow(2, half, half)?.to_dtype(wide)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[left, right], 2)?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_op, random};

    #[test]
    fn rope_and_its_gradient() {
        let table = RopeTable::new(&[0, 1, 2, 0, 1], &[1.0, 0.31, 0.04], 1.3);
        let reference_table = table.clone();
        check_op(
            &[random(&[5, 2, 6], 1)],
            move |t| Ok(vec![reference(&t[0], &reference_table)?]),
            |v| Ok(vec![rope(&v[0], &table)?]),
        );
    }

    #[test]
    fn a_quarter_turn() {
        let quarter = RopeTable::new(&[1], &[std::f32::consts::FRAC_PI_2], 1.0);
        let x = Tensor::new(&[[[2f32, 3.0]]], &Device::Cpu).unwrap();
        let y = rope(&Value::constant(x), &quarter).unwrap();
        let y: Vec<f32> = y.tensor().flatten_all().unwrap().to_vec1().unwrap();
        assert!((y[0] + 3.0).abs() < 1e-6 && (y[1] - 2.0).abs() < 1e-6, "{y:?}");
    }
}
