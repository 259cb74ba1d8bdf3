//! The norm of each head of q or k and the rotary position embedding behind it, as Qwen3 has them.
//!
//! `y = rope(rms_norm(x))` for `x [tokens, heads * head_dim]` and `weight [head_dim]`; the formulas are those of [`rms_norm`] and [`rope`],
//! and nothing between the two is stored where all of a head turns in half-split pairs.
//! Source: Qwen3's attention in Hugging Face's transformers.
//!
//! [`rms_norm`]: crate::rms_norm
//! [`rope`]: crate::rope

use candle_core::{DType, Tensor};
use pmetal_cpu::HeadAngles;
use pmetal_metal::{Gpu, empty, kernels};

use crate::{
    Error, Result, RmsNorm, RopeTable,
    autograd::{Value, composite, one, only},
    elementwise::{converted, pitch_of, readable},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
    rms_norm::{rms_norm_heads, weight_grad_on_gpu},
    rope::{aligned, rope, shared_out, shares, turned_on_gpu},
    rows::GradPlace,
};

const OP: &str = "rms_norm_rope";

/// The norm of every head of `x [tokens, heads * head_dim]` with `weight [head_dim]` (any float dtype), turned by the angles of its token.
pub fn rms_norm_rope(x: &Value, weight: &Value, norm: RmsNorm, table: &RopeTable) -> Result<Value> {
    let _span = profile::span(OP);
    let heads = table.heads(OP, x.tensor())?;
    if weight.tensor().dims() != [table.head_dim()] {
        return Err(Error::operand(OP, "weight", [table.head_dim()], weight.tensor().dims()));
    }
    let place = place(x.tensor(), OP)?;
    // kernels have the weight in the dtype of activations
    let rounds_weight = !norm.rounds_first && weight.tensor().dtype() != x.tensor().dtype();
    let in_one_pass = match &place {
        Place::Reference => true,
        Place::Gpu(_) => shares(table, heads).is_some() && !rounds_weight,
        Place::Cpu => table.is_whole(),
    };
    if !in_one_pass {
        return rope(&rms_norm_heads(x, weight, norm)?, table);
    }
    let (needs, table) = ([x.requires_grad(), weight.requires_grad()], table.clone());
    let weight_t = match &place {
        Place::Gpu(_) => converted(&weight.tensor().contiguous()?, x.tensor().dtype())?,
        _ => norm.weight(&place, weight.tensor(), x.tensor().dtype())?,
    };
    let (x_t, y, rstd) = match &place {
        Place::Reference => {
            return Ok(one(composite(&[x, weight], move |t| Ok(vec![reference(&t[0], &t[1], norm, &table)?]))?));
        }
        Place::Gpu(gpu) => {
            let x_t = readable(x.tensor())?;
            let (y, rstd) = forward_on_gpu(&**gpu, &x_t, &weight_t, norm, &table)?;
            (x_t, y, rstd)
        }
        Place::Cpu => {
            let x_t = x.tensor().contiguous()?;
            let (y, rstd) = forward(&x_t, &weight_t, norm, &table, heads)?;
            (x_t, y, rstd)
        }
    };
    profile::moved(&[&x_t, &y]);
    let saved = Saved { x: x_t, weight: weight_t, norm, rstd, table, heads, grad_place: x.grad_place() };
    Ok(one(Value::record(vec![y], &[x, weight], move |grads| {
        let dy = only(grads, OP)?;
        let (dx, dweight) = match &place {
            Place::Gpu(gpu) => backward_on_gpu(&**gpu, &readable(&dy)?, &saved, needs[1])?,
            _ => backward(&dy.contiguous()?, &saved, needs[1])?,
        };
        profile::moved(&[&dy, &saved.x, &dx]);
        Ok(vec![needs[0].then_some(dx), dweight])
    })))
}

/// What the backward needs: what was normalised, the weight as kernels take it, the norm, `1 / sqrt(mean(x²) + eps)` of each head (f32), and where the gradient goes.
struct Saved {
    x: Tensor,
    weight: Tensor,
    norm: RmsNorm,
    rstd: Tensor,
    table: RopeTable,
    heads: usize,
    grad_place: GradPlace,
}

fn forward_on_gpu(
    gpu: &dyn Gpu,
    x: &Tensor,
    weight: &Tensor,
    norm: RmsNorm,
    table: &RopeTable,
) -> Result<(Tensor, Tensor)> {
    let ((tokens, width), heads, dtype) = (x.dims2()?, table.heads(OP, x)?, x.dtype());
    let (y, rstd) = (empty((tokens, width), dtype, x.device())?, empty((tokens, heads), DType::F32, x.device())?);
    let (grid, params) = shared_out(OP, table, x)?;
    let params = kernels::RopeParams {
        aligned: aligned(table, &[x, weight]),
        x_pitch: pitch_of(x),
        y_pitch: pitch_of(&y),
        eps: norm.eps as f32,
        offset: norm.weight_offset,
        ..params
    };
    let (angles, positions) = table.on(x.device())?;
    kernels::norm_rope(gpu, dtype, grid, x, weight, &angles, &positions, &y, &rstd, params)?;
    Ok((y, rstd))
}

fn backward_on_gpu(gpu: &dyn Gpu, dy: &Tensor, saved: &Saved, needs_weight: bool) -> Result<(Tensor, Option<Tensor>)> {
    let Saved { x, weight, norm, rstd, table, grad_place, .. } = saved;
    let dtype = x.dtype();
    let dx = grad_place.empty(x.dims2()?, dtype, x.device())?;
    let (grid, params) = shared_out(OP, table, x)?;
    let params = kernels::RopeParams {
        aligned: aligned(table, &[dy, x, weight, &dx]),
        dy_pitch: pitch_of(dy),
        x_pitch: pitch_of(x),
        y_pitch: pitch_of(&dx),
        offset: norm.weight_offset,
        ..params
    };
    let (angles, positions) = table.on(x.device())?;
    kernels::norm_rope_backward(gpu, dtype, grid, dy, x, weight, &angles, &positions, rstd, &dx, params)?;
    let dweight = needs_weight.then(|| {
        let back = turned_on_gpu(gpu, dy, table, true, &GradPlace::default())?;
        let of_heads = |t: &Tensor| t.contiguous()?.reshape(((), table.head_dim()));
        weight_grad_on_gpu(gpu, &of_heads(&back)?, &of_heads(x)?, &rstd.flatten_all()?, *norm)
    });
    Ok((dx, dweight.transpose()?))
}

fn angles(table: &RopeTable, heads: usize) -> HeadAngles<'_> {
    let (cos, sin) = table.cos_and_sin();
    HeadAngles { cos, sin, heads }
}

fn forward(x: &Tensor, weight: &Tensor, norm: RmsNorm, table: &RopeTable, heads: usize) -> Result<(Tensor, Tensor)> {
    let (xv, wv) = (View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut rstd = room::<f32>(x.elem_count() / weight.elem_count());
    let y = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut y = room::<T>(x.elem_count());
        let (xs, ws) = (xv.slice::<T>()?, wv.slice::<W>()?);
        pmetal_cpu::rms_norm_rope_forward(xs, ws, norm.eps as f32, norm.rounds_first, angles(table, heads), &mut y, &mut rstd);
        tensor(y, x.shape().clone())
    }))?;
    Ok((y, tensor(rstd, (x.dim(0)?, heads))?))
}

fn backward(dy: &Tensor, saved: &Saved, needs_weight: bool) -> Result<(Tensor, Option<Tensor>)> {
    let Saved { x, weight, norm, rstd, table, heads, .. } = saved;
    let rstdv = View::of_tensor(rstd, OP)?;
    let (dyv, xv, wv) = (View::of_tensor(dy, OP)?, View::of_tensor(x, OP)?, View::of_tensor(weight, OP)?);
    let mut dweight = needs_weight.then(|| vec![0f32; weight.elem_count()]);
    let dx = for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
        let mut dx = room::<T>(x.elem_count());
        let (dys, xs, ws) = (dyv.slice::<T>()?, xv.slice::<T>()?, wv.slice::<W>()?);
        let (rstd, angles, dweight) = (rstdv.slice::<f32>()?, angles(table, *heads), dweight.as_deref_mut());
        pmetal_cpu::rms_norm_rope_backward(dys, xs, ws, rstd, norm.rounds_first, angles, &mut dx, dweight);
        tensor(dx, x.shape().clone())
    }))?;
    let dweight = dweight.map(|d| tensor(d, weight.elem_count())).transpose()?;
    Ok((dx, dweight))
}

/// The formula in plain candle.
fn reference(x: &Tensor, weight: &Tensor, norm: RmsNorm, table: &RopeTable) -> candle_core::Result<Tensor> {
    let heads = x.reshape(((), table.head_dim()))?;
    crate::rope::reference(&crate::rms_norm::reference(&heads, weight, norm)?.reshape(x.shape())?, table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RopeLayout;
    use crate::testing::{check_columns, check_op, random};

    #[test]
    fn columns_of_wider_matrices() {
        for (heads, half) in [(2, 3), (3, 8), (5, 64)] {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &vec![0.3; half], 1.0, RopeLayout::whole(2 * half));
            let inputs = [random(&[5, heads * 2 * half], 1), random(&[2 * half], 2)];
            check_columns(&inputs, &[0], |v| Ok(vec![rms_norm_rope(&v[0], &v[1], RmsNorm::new(1e-6), &table)?]));
        }
    }

    #[test]
    fn norm_and_rope_of_heads_and_their_gradients() {
        let heads = [(1, vec![0.7]), (2, vec![1.0, 0.31, 0.04]), (3, vec![0.3; 40]), (16, vec![0.5; 64])];
        for (heads, inv_freq) in heads.into_iter().chain([(5, vec![0.2; 128]), (1, vec![0.1; 133])]) {
            let head_dim = 2 * inv_freq.len();
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &inv_freq, 1.3, RopeLayout::whole(head_dim));
            let reference_table = table.clone();
            check_op(
                &[random(&[5, heads * head_dim], 1), random(&[head_dim], 2)],
                move |t| Ok(vec![reference(&t[0], &t[1], RmsNorm::new(1e-5), &reference_table)?]),
                |v| Ok(vec![rms_norm_rope(&v[0], &v[1], RmsNorm::new(1e-5), &table)?]),
            );
        }
    }

    /// In one pass, and where heads turn in part or by neighbours, in two.
    #[test]
    fn norms_with_offsets_and_other_layouts_and_their_gradients() {
        let offset = RmsNorm { eps: 1e-5, weight_offset: 1.0, rounds_first: false };
        let part = RopeLayout { head_dim: 9, start: 2, interleaved: false };
        let neighbours = RopeLayout { interleaved: true, ..RopeLayout::whole(6) };
        let plain = RmsNorm::new(1e-5);
        let cases = [(offset, RopeLayout::whole(6)), (plain, part), (offset, part), (plain, neighbours)];
        for (norm, layout) in cases {
            let table = RopeTable::new(&[0, 1, 2, 0, 1], &[1.0, 0.31, 0.04], 1.3, layout);
            let reference_table = table.clone();
            let inputs = [random(&[5, 3 * layout.head_dim], 1), random(&[layout.head_dim], 2)];
            check_op(
                &inputs,
                move |t| Ok(vec![reference(&t[0], &t[1], norm, &reference_table)?]),
                |v| Ok(vec![rms_norm_rope(&v[0], &v[1], norm, &table)?]),
            );
        }
    }

    #[test]
    fn a_weight_of_another_width_is_refused() {
        let table = RopeTable::new(&[0], &[1.0], 1.0, RopeLayout::whole(2));
        let [x, weight] = [random(&[1, 2], 1), random(&[3], 2)].map(Value::constant);
        assert!(rms_norm_rope(&x, &weight, RmsNorm::new(1e-5), &table).is_err());
    }
}
