//! Rotary position embedding, half-split pairs.
//!
//! Pair `(x_i, x_{i + d/2})` of each head turns by `position * inv_freq_i`; backward turns the gradient the other way.
//! Source: Su et al., "RoFormer", 2021, with the pairing of Hugging Face's Llama.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gpu, Grid, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{pitch_of, readable, rows_in_quads},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place, upload},
    profile,
    rows::GradPlace,
};

const OP: &str = "rope";

/// Cosines and sines by position: a model's, computed as far as its passes asked for them, and kept.
#[derive(Debug)]
pub struct RopeAngles {
    inv_freq: Vec<f32>,
    factor: f32,
    known: Mutex<Arc<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// `[2, positions, half]`: cosines, sines.
    data: Vec<f32>,
    positions: usize,
    half: usize,
    /// The same on the device that first asked.
    on_device: OnceLock<Tensor>,
}

impl RopeAngles {
    /// Angles with one frequency per pair and a factor on cosine and sine (1 for plain rope).
    pub fn new(inv_freq: &[f32], factor: f32) -> Self {
        Self { inv_freq: inv_freq.to_vec(), factor, known: Mutex::default() }
    }

    /// The table of tokens at `positions`.
    pub fn of(&self, positions: &[u32]) -> RopeTable {
        let needed = positions.iter().max().map_or(1, |&last| last as usize + 1);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.positions < needed {
            *known = Arc::new(self.computed(needed.next_power_of_two()));
        }
        let (known, positions) = (known.clone(), positions.to_vec());
        RopeTable(Arc::new(Turns { known, positions, sent: OnceLock::new(), gathered: OnceLock::new() }))
    }

    fn computed(&self, positions: usize) -> Known {
        let half = self.inv_freq.len();
        let mut data = vec![0f32; 2 * positions * half];
        let (cosines, sines) = data.split_at_mut(positions * half);
        for (i, (cos, sin)) in cosines.iter_mut().zip(sines).enumerate() {
            let angle = (i / half) as f32 * self.inv_freq[i % half];
            (*cos, *sin) = (angle.cos() * self.factor, angle.sin() * self.factor);
        }
        Known { data, positions, half, on_device: OnceLock::new() }
    }
}

/// Cosines and sines of every token of a batch, `[tokens, head_dim / 2]` f32.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Turns>);

#[derive(Debug)]
struct Turns {
    known: Arc<Known>,
    positions: Vec<u32>,
    /// The positions on the device that first asked.
    sent: OnceLock<Tensor>,
    /// `[2, tokens, half]`, for a CPU.
    gathered: OnceLock<Vec<f32>>,
}

impl RopeTable {
    /// The table for tokens at `positions`, with one frequency per pair and a factor on cosine and sine (1 for plain rope).
    pub fn new(positions: &[u32], inv_freq: &[f32], factor: f32) -> Self {
        RopeAngles::new(inv_freq, factor).of(positions)
    }

    /// Width of the heads that it turns.
    pub(crate) fn head_dim(&self) -> usize {
        2 * self.0.known.half
    }

    /// Heads of a token of `x [tokens, heads * head_dim]`.
    pub(crate) fn heads(&self, op: &'static str, x: &Tensor) -> Result<usize> {
        let ((tokens, width), head_dim) = (x.dims2()?, self.head_dim());
        if head_dim == 0 || !width.is_multiple_of(head_dim) || self.0.positions.len() != tokens {
            return Err(Error::operand(op, "table", [tokens, width], [self.0.positions.len(), head_dim]));
        }
        Ok(width / head_dim)
    }

    /// [`RopeTable::shares`] for a tensor that went to a GPU's kernels.
    pub(crate) fn shared_out(&self, op: &'static str, x: &Tensor) -> Result<(Grid, kernels::RopeParams)> {
        let too_wide = || Error::operand(op, "heads", format_args!("at most {WIDEST} wide"), self.head_dim());
        self.shares(self.heads(op, x)?).ok_or_else(too_wide)
    }

    pub(crate) fn cos_and_sin(&self) -> (&[f32], &[f32]) {
        let Known { data, positions, half, .. } = &*self.0.known;
        let both = self.0.gathered.get_or_init(|| {
            let parts = data.chunks((positions * half).max(1)).flat_map(|part| {
                self.0.positions.iter().flat_map(move |&p| &part[p as usize * half..(p as usize + 1) * half])
            });
            parts.copied().collect()
        });
        both.split_at(both.len() / 2)
    }

    fn tensors(&self, dtype: DType, device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
        let (cos, sin) = self.cos_and_sin();
        let shape = (self.0.positions.len(), 1, self.0.known.half);
        let read = |data: &[f32]| Tensor::from_slice(data, shape, device)?.to_dtype(dtype);
        Ok((read(cos)?, read(sin)?))
    }

    /// Angles by position and the positions, on a device.
    pub(crate) fn on(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let angles = sent(&self.0.known.on_device, device, || upload(&self.0.known.data, device))?;
        Ok((angles, sent(&self.0.sent, device, || upload(&self.0.positions, device))?))
    }

    /// How kernels work on `heads` of every token: their grid, and what they are told beside pitches; none where a head is too wide.
    pub(crate) fn shares(&self, heads: usize) -> Option<(Grid, kernels::RopeParams)> {
        let (tokens, known) = (self.0.positions.len(), &self.0.known);
        let lanes = known.half.div_ceil(QUAD).next_power_of_two();
        let heads_at_a_time = (SIMD_WIDTH / lanes).max(1);
        let turns = heads.div_ceil(heads_at_a_time).max(1);
        let simds = (turns / TURNS).clamp(2, MAX_SIMDS).min(turns);
        let params = kernels::RopeParams {
            heads: heads as u32,
            pairs: known.half as u32,
            known: known.positions as u32,
            lanes_log2: lanes.ilog2(),
            aligned: 0,
            dy_pitch: 0,
            x_pitch: 0,
            y_pitch: 0,
            share: 0.5 / known.half as f32,
            eps: 0.0,
            sign: 1.0,
        };
        (2 * known.half <= WIDEST).then_some((Grid::line(tokens, SIMD_WIDTH * simds), params))
    }
}

/// The widest heads that kernels take.
const WIDEST: usize = 256;

/// Pairs of a head that a thread has.
const QUAD: usize = 4;

/// Threads of a SIMD group, and SIMD groups of a threadgroup at most.
const SIMD_WIDTH: usize = 32;
const MAX_SIMDS: usize = 8;

/// How often a SIMD group takes further heads, roughly: it reads the angles once.
const TURNS: usize = 4;

/// 1 where kernels can move four elements at once in every half of a head, else 0.
pub(crate) fn aligned(table: &RopeTable, tensors: &[&Tensor]) -> u32 {
    rows_in_quads(table.0.known.half, tensors)
}

/// What is held for the device that first asked; for another it is sent again.
fn sent(held: &OnceLock<Tensor>, device: &Device, send: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    if let Some(tensor) = held.get().filter(|t| t.device().same_device(device)) {
        return Ok(tensor.clone());
    }
    let tensor = send()?;
    Ok(if held.get().is_none() { held.get_or_init(|| tensor).clone() } else { tensor })
}

/// Turns the heads of `x [tokens, heads * head_dim]` by the angles of their tokens.
pub fn rope(x: &Value, table: &RopeTable) -> Result<Value> {
    let _span = profile::span(OP);
    let heads = table.heads(OP, x.tensor())?;
    let table = table.clone();
    match place_of_heads(OP, x.tensor(), &table, heads)? {
        Place::Reference => Ok(one(composite(&[x], move |t| Ok(vec![reference(&t[0], &table)?]))?)),
        Place::Gpu(gpu) => {
            let y = turned_on_gpu(&*gpu, x.tensor(), &table, false, &GradPlace::default())?;
            let grad_place = x.grad_place();
            Ok(one(Value::record(vec![y], &[x], move |grads| {
                Ok(vec![Some(turned_on_gpu(&*gpu, &only(grads, OP)?, &table, true, &grad_place)?)])
            })))
        }
        Place::Cpu => {
            let y = turned_on_cpu(x.tensor(), &table, heads, false)?;
            Ok(one(Value::record(vec![y], &[x], move |grads| {
                Ok(vec![Some(turned_on_cpu(&only(grads, OP)?, &table, heads, true)?)])
            })))
        }
    }
}

/// As [`place`]; heads that are too wide for the kernels of a GPU go the reference path.
pub(crate) fn place_of_heads(op: &'static str, x: &Tensor, table: &RopeTable, heads: usize) -> Result<Place> {
    Ok(match place(x, op)? {
        Place::Gpu(_) if table.shares(heads).is_none() => Place::Reference,
        place => place,
    })
}

/// `x` turned, or turned back where it is `inverse`, into `place`.
pub(crate) fn turned_on_gpu(
    gpu: &dyn Gpu,
    x: &Tensor,
    table: &RopeTable,
    inverse: bool,
    place: &GradPlace,
) -> Result<Tensor> {
    let (x, (grid, params)) = (readable(x)?, table.shared_out(OP, x)?);
    let y = place.empty(x.dims2()?, x.dtype(), x.device())?;
    let params = kernels::RopeParams {
        aligned: aligned(table, &[&x, &y]),
        x_pitch: pitch_of(&x),
        y_pitch: pitch_of(&y),
        sign: if inverse { -1.0 } else { 1.0 },
        ..params
    };
    let (angles, positions) = table.on(x.device())?;
    kernels::rope(gpu, x.dtype(), grid, &x, &angles, &positions, &y, params)?;
    profile::moved(&[&x, &y]);
    Ok(y)
}

fn turned_on_cpu(x: &Tensor, table: &RopeTable, heads: usize, inverse: bool) -> Result<Tensor> {
    let ((cos, sin), x) = (table.cos_and_sin(), x.contiguous()?);
    let view = View::of_tensor(&x, OP)?;
    profile::moved(&[&x, &x]);
    for_dtype!(OP, x.dtype(), T => {
        let mut y = room::<T>(x.elem_count());
        pmetal_cpu::rope_into(view.slice::<T>()?, heads, table.head_dim(), cos, sin, inverse, &mut y);
        tensor(y, x.shape().clone())
    })
}

/// The formula in plain candle.
pub(crate) fn reference(x: &Tensor, table: &RopeTable) -> candle_core::Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (cos, sin) = table.tensors(wide, x.device())?;
    let ((tokens, width), half) = (x.dims2()?, table.0.known.half);
    let heads = x.reshape((tokens, width / table.head_dim(), table.head_dim()))?;
    let (a, b) = (heads.narrow(2, 0, half)?.to_dtype(wide)?, heads.narrow(2, half, half)?.to_dtype(wide)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[left, right], 2)?.reshape((tokens, width))?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_columns, check_op, random};

    #[test]
    fn columns_of_wider_matrices() {
        for (heads, half) in [(2, 3), (3, 8), (5, 64)] {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &vec![0.3; half], 1.0);
            check_columns(&[random(&[5, heads * 2 * half], 1)], &[0], |v| Ok(vec![rope(&v[0], &table)?]));
        }
    }

    #[test]
    fn rope_and_its_gradient() {
        let widths =
            [(2, vec![1.0, 0.31, 0.04]), (3, vec![1.0, 0.5, 0.2, 0.1]), (9, vec![0.3; 32]), (3, vec![0.2; 128])];
        for (heads, inv_freq) in widths.into_iter().chain([(1, vec![0.1; 133])]) {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &inv_freq, 1.3);
            let reference_table = table.clone();
            check_op(
                &[random(&[5, heads * 2 * inv_freq.len()], 1)],
                move |t| Ok(vec![reference(&t[0], &reference_table)?]),
                |v| Ok(vec![rope(&v[0], &table)?]),
            );
        }
    }

    #[test]
    fn a_quarter_turn() {
        let quarter = RopeTable::new(&[1], &[std::f32::consts::FRAC_PI_2], 1.0);
        let x = Tensor::new(&[[2f32, 3.0]], &Device::Cpu).unwrap();
        let y = rope(&Value::constant(x), &quarter).unwrap();
        let y: Vec<f32> = y.tensor().flatten_all().unwrap().to_vec1().unwrap();
        assert!((y[0] + 3.0).abs() < 1e-6 && (y[1] - 2.0).abs() < 1e-6, "{y:?}");
    }

    #[test]
    fn angles_that_grew_are_the_same() {
        let (angles, positions) = (RopeAngles::new(&[1.0, 0.1], 1.0), [0, 3, 1]);
        let first = angles.of(&positions);
        let later = angles.of(&[100]);
        let again = angles.of(&positions);
        assert_eq!(first.cos_and_sin(), again.cos_and_sin());
        assert_eq!(later.cos_and_sin(), RopeTable::new(&[100], &[1.0, 0.1], 1.0).cos_and_sin());
        let x = random(&[3, 4], 1).to_dtype(DType::F32).unwrap();
        assert_close(&reference(&x, &first).unwrap(), &reference(&x, &again).unwrap(), 0.0, "turned");
    }

    #[test]
    fn a_table_of_other_tokens_or_heads_is_refused() {
        let table = RopeTable::new(&[0, 1], &[1.0, 0.5], 1.0);
        for shape in [[3, 4], [2, 6]] {
            assert!(rope(&Value::constant(random(&shape, 1)), &table).is_err());
        }
    }
}
