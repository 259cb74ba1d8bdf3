//! Rotary position embedding.
//!
//! Pair `i` of each head, `(a, b)`, turns by `position * inv_freq_i` to `(a cos - b sin, b cos + a sin)`; backward turns the gradient the
//! other way. Pairs are `(x_i, x_{i + d/2})` of the `d` columns that turn, or neighbours: see [`RopeLayout`].
//! Source: Su et al., "RoFormer", 2021, whose pairs are neighbours; the other pairing is that of Hugging Face's transformers.

mod table;

use candle_core::{DType, Tensor};
use pmetal_cpu::HeadLayout;
use pmetal_metal::{Gpu, Grid, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{pitch_of, readable, rows_in_quads},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
    rows::GradPlace,
};

pub use table::{RopeAngles, RopeLayout, RopeTable};

const OP: &str = "rope";

/// [`shares`] for a tensor that went to a GPU's kernels.
pub(crate) fn shared_out(op: &'static str, table: &RopeTable, x: &Tensor) -> Result<(Grid, kernels::RopeParams)> {
    let too_wide = || Error::operand(op, "heads", format_args!("at most {WIDEST} wide"), table.head_dim());
    shares(table, table.heads(op, x)?).ok_or_else(too_wide)
}

/// How kernels work on `heads` of every token, all of which turn in half-split pairs: their grid, and what they are told beside pitches; none
/// where not all turns, or a head is too wide.
pub(crate) fn shares(table: &RopeTable, heads: usize) -> Option<(Grid, kernels::RopeParams)> {
    let (tokens, known) = (table.tokens(), table.known());
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
        offset: 0.0,
    };
    (table.is_whole() && 2 * known.half <= WIDEST).then_some((Grid::line(tokens, SIMD_WIDTH * simds), params))
}

/// The widest heads whose pairs stay in registers.
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
    rows_in_quads(table.known().half, tensors)
}

/// Turns the heads of `x [tokens, heads * head_dim]` by the angles of their tokens.
pub fn rope(x: &Value, table: &RopeTable) -> Result<Value> {
    let _span = profile::span(OP);
    let heads = table.heads(OP, x.tensor())?;
    let table = table.clone();
    match place(x.tensor(), OP)? {
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

/// `x` turned, or turned back where it is `inverse`, into `place`.
pub(crate) fn turned_on_gpu(
    gpu: &dyn Gpu,
    x: &Tensor,
    table: &RopeTable,
    inverse: bool,
    place: &GradPlace,
) -> Result<Tensor> {
    let (x, heads) = (readable(x)?, table.heads(OP, x)?);
    let y = place.empty(x.dims2()?, x.dtype(), x.device())?;
    let sign = if inverse { -1.0 } else { 1.0 };
    profile::moved(&[&x, &y]);
    let Some((grid, params)) = shares(table, heads) else {
        parts_turned_on_gpu(gpu, &x, table, heads, sign, &y)?;
        return Ok(y);
    };
    let params = kernels::RopeParams {
        aligned: aligned(table, &[&x, &y]),
        x_pitch: pitch_of(&x),
        y_pitch: pitch_of(&y),
        sign,
        ..params
    };
    let (angles, positions) = table.on(x.device())?;
    kernels::rope(gpu, x.dtype(), grid, &x, &angles, &positions, &y, params)?;
    Ok(y)
}

fn parts_turned_on_gpu(
    gpu: &dyn Gpu,
    x: &Tensor,
    table: &RopeTable,
    heads: usize,
    sign: f32,
    y: &Tensor,
) -> Result<()> {
    let (RopeLayout { head_dim, start, interleaved }, known) = (table.layout(), table.known());
    let params = kernels::RopePartParams {
        heads: heads as u32,
        head_dim: head_dim as u32,
        start: start as u32,
        pairs: known.half as u32,
        interleaved: u32::from(interleaved),
        known: known.positions as u32,
        x_pitch: pitch_of(x),
        y_pitch: pitch_of(y),
        sign,
    };
    let grid = Grid::line(table.tokens(), SIMD_WIDTH * heads.clamp(1, MAX_SIMDS));
    let (angles, positions) = table.on(x.device())?;
    Ok(kernels::rope_part(gpu, x.dtype(), grid, x, &angles, &positions, y, params)?)
}

fn turned_on_cpu(x: &Tensor, table: &RopeTable, heads: usize, inverse: bool) -> Result<Tensor> {
    let ((cos, sin), x) = (table.cos_and_sin(), x.contiguous()?);
    let RopeLayout { head_dim, start, interleaved } = table.layout();
    let layout = HeadLayout { head_dim, start, interleaved };
    let view = View::of_tensor(&x, OP)?;
    profile::moved(&[&x, &x]);
    for_dtype!(OP, x.dtype(), T => {
        let mut y = room::<T>(x.elem_count());
        pmetal_cpu::rope_into(view.slice::<T>()?, heads, layout, cos, sin, inverse, &mut y);
        tensor(y, x.shape().clone())
    })
}

/// The formula in plain candle.
pub(crate) fn reference(x: &Tensor, table: &RopeTable) -> candle_core::Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (cos, sin) = table.tensors(wide, x.device())?;
    let ((tokens, width), turning) = (x.dims2()?, 2 * table.known().half);
    let RopeLayout { head_dim, start, interleaved } = table.layout();
    let heads = x.reshape((tokens, width / head_dim, head_dim))?;
    let part = heads.narrow(2, start, turning)?.to_dtype(wide)?;
    // the two of a pair lie along dimension 2 or 3
    let (shape, pairs) = match interleaved {
        true => ((tokens, width / head_dim, turning / 2, 2), 3),
        false => ((tokens, width / head_dim, 2, turning / 2), 2),
    };
    let part = part.reshape(shape)?;
    let (a, b) = (part.narrow(pairs, 0, 1)?.squeeze(pairs)?, part.narrow(pairs, 1, 1)?.squeeze(pairs)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = Tensor::stack(&[left, right], pairs)?.flatten_from(2)?.to_dtype(x.dtype())?;
    let rest = start + turning;
    let mut parts = vec![heads.narrow(2, 0, start)?, turned, heads.narrow(2, rest, head_dim - rest)?];
    parts.retain(|part| part.elem_count() > 0);
    Tensor::cat(&parts, 2)?.reshape((tokens, width))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::testing::{assert_close, check_columns, check_op, emulated, random};

    #[test]
    fn columns_of_wider_matrices() {
        for (heads, half) in [(2, 3), (3, 8), (5, 64)] {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &vec![0.3; half], 1.0, RopeLayout::whole(2 * half));
            check_columns(&[random(&[5, heads * 2 * half], 1)], &[0], |v| Ok(vec![rope(&v[0], &table)?]));
        }
    }

    #[test]
    fn rope_and_its_gradient() {
        let widths =
            [(2, vec![1.0, 0.31, 0.04]), (3, vec![1.0, 0.5, 0.2, 0.1]), (9, vec![0.3; 32]), (3, vec![0.2; 128])];
        for (heads, inv_freq) in widths.into_iter().chain([(1, vec![0.1; 133])]) {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &inv_freq, 1.3, RopeLayout::whole(2 * inv_freq.len()));
            let reference_table = table.clone();
            check_op(
                &[random(&[5, heads * 2 * inv_freq.len()], 1)],
                move |t| Ok(vec![reference(&t[0], &reference_table)?]),
                |v| Ok(vec![rope(&v[0], &table)?]),
            );
        }
    }

    /// Head width, start, pairs: a first part, a last, one in the middle, all; of heads that are wider than registers hold too.
    const PARTS: [(usize, usize, usize); 5] = [(9, 0, 3), (20, 14, 3), (17, 4, 5), (8, 0, 4), (300, 1, 140)];

    #[test]
    fn parts_and_neighbours_and_their_gradients() {
        for (interleaved, (head_dim, start, pairs)) in
            [false, true].into_iter().flat_map(|i| PARTS.map(|part| (i, part)))
        {
            let layout = RopeLayout { head_dim, start, interleaved };
            let inv_freq: Vec<f32> = (0..pairs).map(|i| 0.8f32.powi(i as i32)).collect();
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &inv_freq, 1.3, layout);
            let reference_table = table.clone();
            let x = random(&[5, if head_dim > 100 { 1 } else { 3 } * head_dim], 1);
            check_columns(std::slice::from_ref(&x), &[0], |v| Ok(vec![rope(&v[0], &table)?]));
            check_op(&[x], move |t| Ok(vec![reference(&t[0], &reference_table)?]), |v| Ok(vec![rope(&v[0], &table)?]));
        }
    }

    /// Rows of different frequencies behind one another are as each of them alone.
    #[test]
    fn joined_rows_turn_as_each_alone() {
        for layout in [RopeLayout::whole(4), RopeLayout { head_dim: 6, start: 1, interleaved: true }] {
            let (positions, inv_freqs) = ([[0, 1, 2], [0, 1, 9]], [[1.0, 0.1], [0.3, 0.2]]);
            let tables = [0, 1].map(|i| RopeTable::new(&positions[i], &inv_freqs[i], 1.1, layout));
            let x = random(&[6, 2 * layout.head_dim], 1).to_dtype(DType::F32).unwrap();
            let turned = |x: Tensor, table: &RopeTable| rope(&Value::constant(x), table).unwrap().tensor().clone();
            let alone = [0, 1].map(|i| turned(x.narrow(0, 3 * i, 3).unwrap(), &tables[i]));
            let (want, joined) = (Tensor::cat(&alone, 0).unwrap(), RopeTable::joined(&tables));
            assert_close(&want, &turned(x.clone(), &joined), 0.0, "on a CPU");
            assert_close(&want, &emulated(|| turned(x.clone(), &joined)), 1e-6, "on a GPU");
        }
    }

    #[test]
    fn neighbours_are_turned_by_their_own_angle() {
        let (tau, layout) = (std::f32::consts::TAU, RopeLayout { head_dim: 5, start: 1, interleaved: true });
        let table = RopeTable::new(&[1], &[tau / 4.0, tau / 2.0], 1.0, layout);
        let x = Tensor::new(&[[1f32, 2.0, 3.0, 4.0, 5.0]], &Device::Cpu).unwrap();
        let y = rope(&Value::constant(x), &table).unwrap();
        let want = Tensor::new(&[[1f32, -3.0, 2.0, -4.0, -5.0]], &Device::Cpu).unwrap();
        assert_close(&want, y.tensor(), 1e-6, "turned");
    }

    #[test]
    fn a_quarter_turn() {
        let quarter = RopeTable::new(&[1], &[std::f32::consts::FRAC_PI_2], 1.0, RopeLayout::whole(2));
        let x = Tensor::new(&[[2f32, 3.0]], &Device::Cpu).unwrap();
        let y = rope(&Value::constant(x), &quarter).unwrap();
        let y: Vec<f32> = y.tensor().flatten_all().unwrap().to_vec1().unwrap();
        assert!((y[0] + 3.0).abs() < 1e-6 && (y[1] - 2.0).abs() < 1e-6, "{y:?}");
    }
}
