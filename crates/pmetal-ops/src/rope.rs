//! Rotary position embedding, half-split pairs.
//!
//! Pair `(x_i, x_{i + d/2})` of each head turns by `position * inv_freq_i`; backward turns the gradient the other way.
//! Source: Su et al., "RoFormer", 2021, with the pairing of Hugging Face's Llama.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::rows_in_quads,
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place, upload},
    profile,
};

const OP: &str = "rope";

/// Cosines and sines of every token of a batch, `[tokens, head_dim / 2]` f32.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Angles>);

#[derive(Debug)]
struct Angles {
    /// `[2, tokens, half]`: cosines, sines.
    data: Vec<f32>,
    half: usize,
    /// The same on the device that first asked.
    on_device: OnceLock<Tensor>,
}

impl RopeTable {
    /// The table for tokens at `positions`, with one frequency per pair and a factor on cosine and sine (1 for plain rope).
    pub fn new(positions: &[u32], inv_freq: &[f32], factor: f32) -> Self {
        let angles = || positions.iter().flat_map(|&p| inv_freq.iter().map(move |f| p as f32 * f));
        let data = angles().map(|a| a.cos() * factor).chain(angles().map(|a| a.sin() * factor)).collect();
        Self(Arc::new(Angles { data, half: inv_freq.len(), on_device: OnceLock::new() }))
    }

    /// That the table is one of `tokens` tokens and heads of `head_dim`.
    pub(crate) fn check(&self, op: &'static str, tokens: usize, head_dim: usize) -> Result<()> {
        if self.0.half * 2 != head_dim || self.0.data.len() != 2 * tokens * self.0.half {
            return Err(Error::operand(op, "table", [tokens, head_dim / 2], [self.0.data.len() / 2, self.0.half]));
        }
        Ok(())
    }

    pub(crate) fn cos_and_sin(&self) -> (&[f32], &[f32]) {
        self.0.data.split_at(self.0.data.len() / 2)
    }

    fn tensors(&self, dtype: DType, device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
        let (cos, sin) = self.cos_and_sin();
        let shape = (cos.len() / self.0.half.max(1), 1, self.0.half);
        let read = |data: &[f32]| Tensor::from_slice(data, shape, device)?.to_dtype(dtype);
        Ok((read(cos)?, read(sin)?))
    }

    /// The angles on a device, uploaded once for all layers.
    fn on(&self, device: &Device) -> Result<Tensor> {
        let held = &self.0.on_device;
        if let Some(tensor) = held.get().filter(|t| t.device().same_device(device)) {
            return Ok(tensor.clone());
        }
        let tensor = upload(&self.0.data, device)?;
        Ok(if held.get().is_none() { held.get_or_init(|| tensor).clone() } else { tensor })
    }
}

/// Turns `x [tokens, heads, head_dim]` by the angles of its tokens.
pub fn rope(x: &Value, table: &RopeTable) -> Result<Value> {
    let _span = profile::span(OP);
    let (tokens, _, head_dim) = x.tensor().dims3()?;
    table.check(OP, tokens, head_dim)?;
    let table = table.clone();
    let place = place(x.tensor(), OP)?;
    if let Place::Reference = place {
        return Ok(one(composite(&[x], move |t| Ok(vec![reference(&t[0], &table)?]))?));
    }
    let y = turned(&place, x.tensor(), &table, false)?;
    Ok(one(Value::record(vec![y], &[x], move |grads| Ok(vec![Some(turned(&place, &only(grads, OP)?, &table, true)?)]))))
}

fn turned(place: &Place, x: &Tensor, table: &RopeTable, inverse: bool) -> Result<Tensor> {
    match place {
        Place::Gpu(gpu) => turned_on_gpu(&**gpu, &x.contiguous()?, table, inverse),
        _ => turned_on_cpu(&x.contiguous()?, table, inverse),
    }
}

fn turned_on_gpu(gpu: &dyn Gpu, x: &Tensor, table: &RopeTable, inverse: bool) -> Result<Tensor> {
    let (tokens, heads, _) = x.dims3()?;
    let pairs = table.0.half;
    let y = empty(x.shape(), x.dtype(), x.device())?;
    let aligned = rows_in_quads(pairs, &[x]);
    let items = heads * if aligned == 1 { pairs / 4 } else { pairs };
    let params = kernels::RopeParams {
        tokens: tokens as u32,
        heads: heads as u32,
        pairs: pairs as u32,
        aligned,
        sign: if inverse { -1.0 } else { 1.0 },
    };
    let grid = Grid::line(tokens, items.next_multiple_of(32).clamp(32, 256));
    kernels::rope(gpu, x.dtype(), grid, x, &table.on(x.device())?, &y, params)?;
    Ok(y)
}

fn turned_on_cpu(x: &Tensor, table: &RopeTable, inverse: bool) -> Result<Tensor> {
    let (cos, sin) = table.cos_and_sin();
    let (_, heads, head_dim) = x.dims3()?;
    let view = View::of_tensor(x, OP)?;
    for_dtype!(OP, x.dtype(), T => {
        let mut y = room::<T>(x.elem_count());
        pmetal_cpu::rope_into(view.slice::<T>()?, heads, head_dim, cos, sin, inverse, &mut y);
        tensor(y, x.shape().clone())
    })
}

/// The formula in plain candle.
pub(crate) fn reference(x: &Tensor, table: &RopeTable) -> candle_core::Result<Tensor> {
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
        for (heads, inv_freq) in [(2, vec![1.0, 0.31, 0.04]), (3, vec![1.0, 0.5, 0.2, 0.1]), (9, vec![0.3; 32])] {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &inv_freq, 1.3);
            let reference_table = table.clone();
            check_op(
                &[random(&[5, heads, 2 * inv_freq.len()], 1)],
                move |t| Ok(vec![reference(&t[0], &reference_table)?]),
                |v| Ok(vec![rope(&v[0], &table)?]),
            );
        }
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
