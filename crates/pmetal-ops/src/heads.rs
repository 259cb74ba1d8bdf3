//! The heads of a row taken apart: what latent attention does between its products. DeepSeek-AI, "DeepSeek-V2", 2024.
//!
//! A row is `heads` groups of columns behind one another. These are copies, by plain candle on every device.

use std::ops::Range;

use candle_core::{DType, Tensor};
use pmetal_cpu::{Mat, matmul};

use crate::{
    Error, Result, Weight,
    autograd::{Value, one, only},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place},
    profile,
};

const OP: &str = "heads";

/// `x [rows, heads * from]` with zeros behind each head: `[rows, heads * to]`.
///
/// # Errors
/// Where the columns are not those of so many heads, or `to` is less than `from`.
pub fn pad_heads(x: &Value, heads: usize, to: usize) -> Result<Value> {
    let _span = profile::span(OP);
    let from = width_of(x.tensor(), heads)?;
    if to < from {
        return Err(Error::operand(OP, "width", format!("at least {from}"), to));
    }
    let y = padded(x.tensor(), heads, 0, to)?;
    profile::moved(&[x.tensor(), &y]);
    Ok(one(Value::record(vec![y], &[x], move |grads| Ok(vec![Some(cut(&only(grads, OP)?, heads, 0..from)?)]))))
}

/// Columns `start .. start + to` of each head of `x [rows, heads * from]`: `[rows, heads * to]`.
///
/// # Errors
/// Where the columns are not those of so many heads, or a head has not so many.
pub fn cut_heads(x: &Value, heads: usize, start: usize, to: usize) -> Result<Value> {
    let _span = profile::span(OP);
    let from = width_of(x.tensor(), heads)?;
    if start + to > from {
        return Err(Error::operand(OP, "columns", format!("within {from}"), start..start + to));
    }
    let y = cut(x.tensor(), heads, start..start + to)?;
    profile::moved(&[&y, &y]);
    Ok(one(Value::record(vec![y], &[x], move |grads| Ok(vec![Some(padded(&only(grads, OP)?, heads, start, from)?)]))))
}

/// The heads of `b [rows, heads * wb]` behind those of `a [rows, heads * wa]`: `[rows, heads * (wa + wb)]`.
///
/// # Errors
/// Where rows, dtypes or heads do not fit.
pub fn join_heads(a: &Value, b: &Value, heads: usize) -> Result<Value> {
    joined(a, b, heads, heads)
}

/// `b [rows, wb]` behind each head of `a [rows, heads * wa]`: `[rows, heads * (wa + wb)]`. The gradient of `b` is the sum over the heads, in
/// f32.
///
/// # Errors
/// Where rows, dtypes or heads do not fit.
pub fn join_heads_with_shared(a: &Value, b: &Value, heads: usize) -> Result<Value> {
    joined(a, b, heads, 1)
}

fn joined(a: &Value, b: &Value, heads: usize, b_heads: usize) -> Result<Value> {
    let _span = profile::span(OP);
    let (a_width, b_width) = (width_of(a.tensor(), heads)?, width_of(b.tensor(), b_heads)?);
    let (rows, dtype) = (a.tensor().dim(0)?, a.tensor().dtype());
    if (b.tensor().dim(0)?, b.tensor().dtype()) != (rows, dtype) {
        return Err(Error::operand(OP, "right operand", (rows, dtype), (b.tensor().dim(0)?, b.tensor().dtype())));
    }
    let left = a.tensor().reshape((rows, heads, a_width))?;
    let right = b.tensor().reshape((rows, b_heads, b_width))?.expand((rows, heads, b_width))?.contiguous()?;
    let y = Tensor::cat(&[&left, &right], 2)?.reshape((rows, heads * (a_width + b_width)))?;
    profile::moved(&[&y, &y]);
    Ok(one(Value::record(vec![y], &[a, b], move |grads| {
        let dy = only(grads, OP)?;
        let mut db = cut(&dy, heads, a_width..a_width + b_width)?;
        if b_heads != heads {
            db = sum_of_heads(&db, heads)?;
        }
        Ok(vec![Some(cut(&dy, heads, 0..a_width)?), Some(db)])
    })))
}

/// `y_h = x_h W_h`, or `x_h W_hᵀ` where `transposed`, for each head `h` separately: `W_h` is rows `part` of the `h`-th of `heads` equal groups
/// of rows of `weight [heads * n, columns]`. With `x [rows, heads * part.len()]` comes `[rows, heads * columns]`; where `transposed`, the other
/// way round. No gradient is recorded.
///
/// With a weight that makes keys (`part` 0 .. k) and values (`part` k .. k + v) of latents, that is how queries come to the latents, and results
/// from them (`transposed`). A packed weight is unpacked at every call.
///
/// # Errors
/// Where shapes do not fit.
pub fn product_by_heads(
    x: &Tensor,
    weight: &Weight,
    heads: usize,
    part: Range<usize>,
    transposed: bool,
) -> Result<Tensor> {
    let _span = profile::span(OP);
    let (width, (weight_rows, columns)) = (width_of(x, heads)?, weight.shape().dims2()?);
    let shape = HeadProduct { heads, of_each: weight_rows / heads, part, columns, transposed };
    if weight_rows % heads != 0 || shape.part.start > shape.part.end || shape.part.end > shape.of_each {
        return Err(Error::operand(
            OP,
            "weight",
            format!("{heads} heads of at least {:?} rows", shape.part),
            weight_rows,
        ));
    }
    if width != shape.depth() {
        return Err(Error::operand(OP, "width of a head", shape.depth(), width));
    }
    profile::work(|| 2.0 * (x.elem_count() * shape.width()) as f64);
    match place(x, OP)? {
        Place::Cpu => match weight {
            Weight::Packed(..) => shape.on_cpu(x, &Weight::Frozen(weight.tensor()?)),
            _ => shape.on_cpu(x, weight),
        },
        _ => shape.by_candle(x, weight),
    }
}

struct HeadProduct {
    heads: usize,
    /// Rows of the weight that each head has.
    of_each: usize,
    part: Range<usize>,
    columns: usize,
    transposed: bool,
}

impl HeadProduct {
    /// Columns of a head of the input.
    fn depth(&self) -> usize {
        if self.transposed { self.columns } else { self.part.len() }
    }

    /// Columns of a head of the result.
    fn width(&self) -> usize {
        if self.transposed { self.part.len() } else { self.columns }
    }

    fn on_cpu(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let x = x.contiguous()?;
        let (x_view, view, rows) = (View::of_tensor(&x, OP)?, weight.view()?, x.dim(0)?);
        let (depth, width) = (self.depth(), self.width());
        for_dtype!(OP, x.dtype(), T => for_dtype!(OP, weight.dtype(), W => {
            let (x, w) = (x_view.slice::<T>()?, view.slice::<W>()?);
            let mut y = room::<T>(rows * self.heads * width);
            for head in (0..self.heads).filter(|_| rows > 0) {
                let first = (head * self.of_each + self.part.start) * self.columns;
                let w = Mat::new(&w[first..first + self.part.len() * self.columns], self.part.len(), self.columns);
                let x = Mat::strided(&x[head * depth..], rows, depth, self.heads * depth);
                matmul(&mut y[head * width..], self.heads * width, x, if self.transposed { w.t() } else { w }, 1.0, 0.0);
            }
            tensor(y, (rows, self.heads * width))
        }))
    }

    fn by_candle(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let (rows, heads) = (x.dim(0)?, self.heads);
        let w = weight.tensor_in(x.dtype())?.reshape((heads, self.of_each, self.columns))?;
        let w = w.narrow(1, self.part.start, self.part.len())?;
        let w = if self.transposed { w.transpose(1, 2)? } else { w };
        let x = x.reshape((rows, heads, self.depth()))?.transpose(0, 1)?.contiguous()?;
        Ok(x.matmul(&w)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads * self.width()))?)
    }
}

/// Columns of a head of `x [rows, heads * width]`.
fn width_of(x: &Tensor, heads: usize) -> Result<usize> {
    let (_, columns) = x.dims2()?;
    if heads == 0 || columns % heads != 0 {
        return Err(Error::operand(OP, "columns", format!("a multiple of {heads}"), columns));
    }
    Ok(columns / heads)
}

/// A copy: the walk back adds to gradients in place.
fn cut(x: &Tensor, heads: usize, columns: Range<usize>) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let heads_of_rows = x.reshape((rows, heads, width_of(x, heads)?))?;
    let part = heads_of_rows.narrow(2, columns.start, columns.len())?.force_contiguous()?;
    Ok(part.reshape((rows, heads * columns.len()))?)
}

/// `x [rows, heads * n]` from column `start` of each head of `to` on, zeros around it.
fn padded(x: &Tensor, heads: usize, start: usize, to: usize) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let y = Tensor::zeros((rows * heads, to), x.dtype(), x.device())?;
    y.slice_set(&x.reshape((rows * heads, width_of(x, heads)?))?.contiguous()?, 1, start)?;
    Ok(y.reshape((rows, heads * to))?)
}

fn sum_of_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, width) = (x.dim(0)?, width_of(x, heads)?);
    if let (Place::Cpu, 1..) = (place(x, OP)?, width) {
        let view = View::of_tensor(x, OP)?;
        return for_dtype!(OP, x.dtype(), T => {
            let mut y = room::<T>(rows * width);
            pmetal_cpu::sum_heads(view.slice::<T>()?, heads, width, &mut y);
            tensor(y, (rows, width))
        });
    }
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok(x.reshape((rows, heads, width))?.to_dtype(wide)?.sum(1)?.to_dtype(x.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, check_op, emulated, random};

    #[test]
    fn padding_and_cutting() {
        for heads in [1, 3] {
            let x = [random(&[5, heads * 4], 1)];
            let padded = move |t: &[Tensor]| {
                let y = t[0].reshape((5, heads, 4))?.pad_with_zeros(2, 0, 3)?;
                Ok(vec![y.reshape((5, heads * 7))?])
            };
            check_op(&x, padded, |v| Ok(vec![pad_heads(&v[0], heads, 7)?]));
            for (start, to) in [(0, 4), (1, 2), (2, 2)] {
                let cut = move |t: &[Tensor]| {
                    let y = t[0].reshape((5, heads, 4))?.narrow(2, start, to)?.contiguous()?;
                    Ok(vec![y.reshape((5, heads * to))?])
                };
                check_op(&x, cut, |v| Ok(vec![cut_heads(&v[0], heads, start, to)?]));
            }
        }
    }

    #[test]
    fn joining() {
        for (heads, shared) in [(1, false), (3, false), (3, true)] {
            let b_heads = if shared { 1 } else { heads };
            let inputs = [random(&[5, heads * 4], 1), random(&[5, b_heads * 3], 2)];
            let formula = move |t: &[Tensor]| {
                let a = t[0].reshape((5, heads, 4))?;
                let b = t[1].reshape((5, b_heads, 3))?.broadcast_as((5, heads, 3))?;
                Ok(vec![Tensor::cat(&[a, b], 2)?.reshape((5, heads * 7))?])
            };
            let join = if shared { join_heads_with_shared } else { join_heads };
            check_op(&inputs, formula, |v| Ok(vec![join(&v[0], &v[1], heads)?]));
        }
    }

    /// Two heads whose keys have 5 rows of the weight and whose values have 3, out of latents of 6.
    #[test]
    fn products_of_heads() {
        let weight = random(&[16, 6], 1);
        for (rows, transposed) in [1, 4, 40].iter().flat_map(|&rows| [(rows, false), (rows, true)]) {
            let (part, width) = if transposed { (5..8, 6) } else { (0..5, 5) };
            let x = random(&[rows, 2 * width], 2);
            let of_head = |head: usize| {
                let w = weight.narrow(0, 8 * head + part.start, part.len()).unwrap();
                let w = if transposed { w.t().unwrap() } else { w };
                x.narrow(1, head * width, width).unwrap().contiguous().unwrap().matmul(&w).unwrap()
            };
            let want = Tensor::cat(&[of_head(0), of_head(1)], 1).unwrap();
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2), (DType::F64, 1e-12)] {
                let [x, weight] = [&x, &weight].map(|t| t.to_dtype(dtype).unwrap());
                let plain = Weight::Frozen(weight);
                for weight in [plain.clone().packed().unwrap(), plain] {
                    let run = || product_by_heads(&x, &weight, 2, part.clone(), transposed).unwrap();
                    assert_close(&want, &run(), tolerance, "CPU");
                    if dtype == DType::F32 {
                        assert_close(&want, &emulated(run), tolerance, "GPU");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = Value::constant(random(&[2, 12], 1));
        assert!(pad_heads(&x, 5, 7).is_err() && pad_heads(&x, 0, 7).is_err() && pad_heads(&x, 3, 2).is_err());
        assert!(cut_heads(&x, 3, 2, 3).is_err());
        assert!(join_heads(&x, &Value::constant(random(&[3, 12], 1)), 3).is_err());
        let weight = Weight::Frozen(random(&[9, 4], 1));
        assert!(product_by_heads(x.tensor(), &weight, 3, 0..4, false).is_err());
        assert!(product_by_heads(x.tensor(), &weight, 3, 0..3, false).is_err());
    }
}
