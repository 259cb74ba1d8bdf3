//! Rows and columns of a matrix apart, and matrices below and beside one another.
//!
//! Parts are views of the whole where a device's kernels read rows with a pitch, copies where they do not. The gradient of a whole is its parts'
//! side by side: on a GPU each is written where it belongs, so that nothing is moved.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use pmetal_cpu::{Columns, copy_columns};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{pitch_of, readable},
    kernel::{View, for_dtype, room, tensor, with_slice_mut},
    place::{Place, place},
    profile,
    rows::{GradRows, same_memory},
};

const OP: &str = "parts";

/// The rows of `x [n, width]` in parts of `counts` rows, which add up to `n`.
pub fn split_rows(x: &Value, counts: &[usize]) -> Result<Vec<Value>> {
    let _span = profile::span(OP);
    let (rows, width) = x.tensor().dims2()?;
    let starts = starts(counts, rows, "rows")?;
    let part = |of: &Tensor, i: usize| of.narrow(0, starts[i], counts[i]);
    let parts = (0..counts.len()).map(|i| part(x.tensor(), i)).collect::<candle_core::Result<Vec<_>>>()?;
    let (lengths, dtype, device) = (counts.to_vec(), x.tensor().dtype(), x.tensor().device().clone());
    let values = Value::record(parts, &[x], move |grads| {
        let parts = grads.into_iter().zip(lengths).map(|(grad, rows)| match grad {
            Some(grad) => Ok(grad),
            None => Tensor::zeros((rows, width), dtype, &device),
        });
        Ok(vec![Some(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?)])
    });
    let Some(parent) = x.spare() else { return Ok(values) };
    values.into_iter().enumerate().map(|(i, value)| Ok(value.with_spare(part(parent, i)?))).collect()
}

/// Matrices of one width below one another.
pub fn join_rows(parts: &[Value]) -> Result<Value> {
    let _span = profile::span(OP);
    let counts = parts.iter().map(|part| Ok(part.tensor().dims2()?.0)).collect::<Result<Vec<_>>>()?;
    let y = Tensor::cat(&parts.iter().map(Value::tensor).collect::<Vec<_>>(), 0)?;
    let starts = starts(&counts, y.dim(0)?, "rows")?;
    Ok(one(Value::record(vec![y], &parts.iter().collect::<Vec<_>>(), move |grads| {
        let dy = only(grads, OP)?;
        // copies: the walk may add to a part's gradient in place, and this one may still be another's too
        let part = |(&first, &rows): (&usize, &usize)| Ok(Some(dy.narrow(0, first, rows)?.force_contiguous()?));
        starts.iter().zip(&counts).map(part).collect()
    })))
}

/// The columns of `x [rows, n]` in parts of `widths` columns, which add up to `n`.
pub fn split_columns(x: &Value, widths: &[usize]) -> Result<Vec<Value>> {
    let _span = profile::span(OP);
    let (rows, width) = x.tensor().dims2()?;
    let starts = starts(widths, width, "columns")?;
    let widths = widths.to_vec();
    match place(x.tensor(), OP)? {
        Place::Reference => composite(&[x], move |t| {
            starts.iter().zip(&widths).map(|(&first, &width)| t[0].narrow(1, first, width)?.contiguous()).collect()
        }),
        Place::Cpu => {
            let x_t = x.tensor().contiguous()?;
            let part = |(&first, &width): (&usize, &usize)| column_part(&x_t, first, width);
            let parts = starts.iter().zip(&widths).map(part).collect::<Result<Vec<_>>>()?;
            profile::moved(&parts.iter().collect::<Vec<_>>());
            let dtype = x_t.dtype();
            Ok(Value::record(parts, &[x], move |grads| Ok(vec![Some(side_by_side(grads, rows, &widths, dtype)?)])))
        }
        Place::Gpu(gpu) => split_columns_on_gpu(gpu, x, starts, widths),
    }
}

/// Matrices of as many rows beside one another.
pub fn join_columns(parts: &[Value]) -> Result<Value> {
    let _span = profile::span(OP);
    let Some(first) = parts.first() else { return Err(Error::operand(OP, "number of parts", "at least 1", 0)) };
    let (rows, dtype, device) = (first.tensor().dim(0)?, first.tensor().dtype(), first.tensor().device().clone());
    let mut widths = Vec::with_capacity(parts.len());
    for part in parts {
        let (found, width) = part.tensor().dims2()?;
        if (found, part.tensor().dtype()) != (rows, dtype) {
            return Err(Error::operand(OP, "part", (rows, dtype), (found, part.tensor().dtype())));
        }
        widths.push(width);
    }
    let total = widths.iter().sum();
    let starts = starts(&widths, total, "columns")?;
    let inputs: Vec<&Value> = parts.iter().collect();
    let places: Vec<_> = parts.iter().map(Value::grad_place).collect();
    match place(first.tensor(), OP)? {
        Place::Reference => Ok(one(composite(&inputs, |t| Ok(vec![Tensor::cat(t, 1)?]))?)),
        Place::Cpu => {
            let tensors = parts.iter().map(|part| Some(part.tensor().clone())).collect();
            let y = side_by_side(tensors, rows, &widths, dtype)?;
            profile::moved(&[&y, &y]);
            Ok(one(Value::record(vec![y], &inputs, move |grads| {
                let dy = only(grads, OP)?.contiguous()?;
                let part = |(&first, &width): (&usize, &usize)| Ok(Some(column_part(&dy, first, width)?));
                starts.iter().zip(&widths).map(part).collect()
            })))
        }
        Place::Gpu(gpu) => {
            let y = empty((rows, total), dtype, &device)?;
            for ((part, &first), &width) in parts.iter().zip(&starts).zip(&widths) {
                copy_rows(&*gpu, &readable(part.tensor())?, &y.narrow(1, first, width)?)?;
            }
            profile::moved(&[&y, &y]);
            Ok(one(Value::record(vec![y], &inputs, move |grads| {
                let dy = readable(&only(grads, OP)?)?;
                let part = |((&first, &width), place): ((&usize, &usize), &crate::rows::GradPlace)| {
                    let grad = place.empty((rows, width), dtype, &device)?;
                    copy_rows(&*gpu, &dy.narrow(1, first, width)?, &grad)?;
                    Ok(Some(grad))
                };
                starts.iter().zip(&widths).zip(&places).map(part).collect()
            })))
        }
    }
}

fn split_columns_on_gpu(gpu: Arc<dyn Gpu>, x: &Value, starts: Vec<usize>, widths: Vec<usize>) -> Result<Vec<Value>> {
    let x_t = readable(x.tensor())?;
    let (rows, width) = x_t.dims2()?;
    let (dtype, device) = (x_t.dtype(), x_t.device().clone());
    let part = |(&first, &width): (&usize, &usize)| x_t.narrow(1, first, width);
    let parts = starts.iter().zip(&widths).map(part).collect::<candle_core::Result<Vec<_>>>()?;
    // where the gradient of the whole has a place, the parts' lie in it
    let (shared, before) = x.grad_place().divided((rows, width)).unwrap_or_else(|| (GradRows::new(rows, width), 0));
    let places: Vec<_> = starts.iter().map(|first| shared.place(before + first)).collect();
    let values = Value::record(parts, &[x], move |grads| {
        let whole = shared.parent(dtype, &device)?.narrow(1, before, width)?;
        for ((grad, &first), &width) in grads.into_iter().zip(&starts).zip(&widths) {
            let place = whole.narrow(1, first, width)?;
            match grad {
                Some(grad) if same_memory(&grad, &place) => {}
                Some(grad) => copy_rows(&*gpu, &readable(&grad)?, &place)?,
                None => copy_rows(&*gpu, &Tensor::zeros((rows, width), dtype, &device)?, &place)?,
            }
        }
        Ok(vec![Some(whole)])
    });
    Ok(values.into_iter().zip(places).map(|(value, place)| value.with_grad_place(place)).collect())
}

/// Where each part begins.
fn starts(lengths: &[usize], total: usize, what: &str) -> Result<Vec<usize>> {
    let mut end = 0;
    let mut starts = Vec::with_capacity(lengths.len());
    for length in lengths {
        starts.push(end);
        end += length;
    }
    if end == total { Ok(starts) } else { Err(Error::operand(OP, format!("sum of {what}"), total, end)) }
}

/// `y = x`, rows with a pitch.
fn copy_rows(gpu: &dyn Gpu, x: &Tensor, y: &Tensor) -> Result<()> {
    let (rows, width) = x.dims2()?;
    let (x_pitch, y_pitch) = (pitch_of(x), pitch_of(y));
    let params = kernels::CopyRowsParams { rows: rows as u32, width: width as u32, x_pitch, y_pitch };
    Ok(kernels::copy_rows(gpu, x.dtype(), Grid::line(rows, 256), x, y, params)?)
}

/// Columns `first ..` of a contiguous matrix on the CPU.
fn column_part(x: &Tensor, first: usize, width: usize) -> Result<Tensor> {
    let ((rows, pitch), view) = (x.dims2()?, View::of_tensor(x, OP)?);
    for_dtype!(OP, x.dtype(), T => {
        let mut y = room::<T>(rows * width);
        copy_columns(view.slice::<T>()?, Columns { pitch, first }, &mut y, Columns { pitch: width, first: 0 }, width);
        tensor(y, (rows, width))
    })
}

/// Matrices on the CPU beside one another; one that is missing is zeros.
fn side_by_side(parts: Vec<Option<Tensor>>, rows: usize, widths: &[usize], dtype: DType) -> Result<Tensor> {
    let pitch = widths.iter().sum();
    for_dtype!(OP, dtype, T => {
        let y = tensor(room::<T>(rows * pitch), (rows, pitch))?;
        let mut first = 0;
        for (part, &width) in parts.into_iter().zip(widths) {
            let part = part.map_or_else(|| Tensor::zeros((rows, width), dtype, &Device::Cpu), |part| part.contiguous())?;
            let x = View::of_tensor(&part, OP)?;
            let x = x.slice::<T>()?;
            with_slice_mut::<T, _>(&y, OP, |y| {
                copy_columns(x, Columns { pitch: width, first: 0 }, y, Columns { pitch, first }, width);
            })?;
            first += width;
        }
        Ok(y)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gradients,
        testing::{assert_close, check_columns, check_op, emulated, random},
    };

    fn narrowed(t: &Tensor, dim: usize, lengths: &[usize]) -> candle_core::Result<Vec<Tensor>> {
        let starts = starts(lengths, t.dim(dim)?, "lengths").unwrap();
        starts.iter().zip(lengths).map(|(&first, &length)| t.narrow(dim, first, length)).collect()
    }

    #[test]
    fn apart_and_together_and_their_gradients() {
        let x = [random(&[9, 24], 1)];
        check_op(&x, |t| narrowed(&t[0], 0, &[4, 3, 2]), |v| split_rows(&v[0], &[4, 3, 2]));
        for widths in [&[8, 16][..], &[5, 1, 18], &[24]] {
            check_op(&x, move |t| narrowed(&t[0], 1, widths), |v| split_columns(&v[0], widths));
        }
        let parts = [random(&[3, 7], 1), random(&[1, 7], 2), random(&[5, 7], 3)];
        check_op(&parts, |t| Ok(vec![Tensor::cat(t, 0)?]), |v| Ok(vec![join_rows(v)?]));
        let parts = [random(&[3, 7], 1), random(&[3, 1], 2), random(&[3, 24], 3)];
        check_op(&parts, |t| Ok(vec![Tensor::cat(t, 1)?]), |v| Ok(vec![join_columns(v)?]));
    }

    #[test]
    fn a_part_that_nobody_reads_has_no_gradient() {
        // the second of three
        let run = |split: fn(&Value, &[usize]) -> Result<Vec<Value>>| {
            let x = Value::variable(random(&[6, 6], 1).to_dtype(DType::F32).unwrap());
            let roots = split(&x, &[3, 2, 1]).unwrap().into_iter().enumerate().filter(|(i, _)| *i != 1);
            let roots = roots.map(|(i, part)| {
                let dy = (part.tensor().ones_like().unwrap() * (i + 1) as f64).unwrap();
                (part, dy)
            });
            gradients(roots.collect(), &[&x]).unwrap().remove(0).unwrap().to_vec2::<f32>().unwrap()
        };
        let expected = [1.0, 1.0, 1.0, 0.0, 0.0, 3.0];
        for by_place in [|f: &dyn Fn()| f(), |f: &dyn Fn()| emulated(f)] as [fn(&dyn Fn()); 2] {
            by_place(&|| {
                assert!(run(split_columns).iter().all(|row| *row == expected));
                assert!(run(split_rows).iter().zip(expected).all(|(row, want)| row.iter().all(|x| *x == want)));
            });
        }
    }

    #[test]
    fn columns_of_wider_matrices() {
        let x = [random(&[5, 24], 1)];
        check_columns(&x, &[], |v| split_rows(&v[0], &[2, 3]));
        check_columns(&x, &[0], |v| split_columns(&v[0], &[16, 8]));
        let parts = [random(&[3, 7], 1), random(&[3, 24], 3)];
        check_columns(&parts, &[], |v| Ok(vec![join_rows(&v[1..])?]));
        check_columns(&parts, &[0, 1], |v| Ok(vec![join_columns(v)?]));
    }

    /// The gradient of a part is written where the whole's shall lie.
    #[test]
    fn nothing_is_moved_where_gradients_have_their_places() {
        emulated(|| {
            let place = GradRows::new(4, 32);
            let x = Value::variable(random(&[4, 24], 1).to_dtype(DType::F32).unwrap()).with_grad_place(place.place(8));
            let parts = split_columns(&x, &[16, 8]).unwrap();
            let y = crate::gated_activation(crate::Activation::Silu, &parts[0], &parts[0], 0).unwrap();
            let dy = y.tensor().ones_like().unwrap();
            let dx = gradients(vec![(y, dy)], &[&x]).unwrap().remove(0).unwrap();
            let whole = place.parent(DType::F32, &Device::Cpu).unwrap().narrow(1, 8, 24).unwrap();
            assert!(same_memory(&dx, &whole));
            assert!(parts[1].tensor().storage_and_layout().1.start_offset() == 16, "a view");
            let unread = dx.narrow(1, 16, 8).unwrap().contiguous().unwrap();
            assert_close(&unread.zeros_like().unwrap(), &unread, 0.0, "no gradient");
        });
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let x = Value::constant(random(&[4, 6], 1).to_dtype(DType::F32).unwrap());
        assert!(split_rows(&x, &[1, 2]).is_err() && split_columns(&x, &[6, 1]).is_err());
        assert!(join_rows(&[]).is_err() && join_columns(&[]).is_err());
        let other = Value::constant(random(&[3, 6], 1).to_dtype(DType::F32).unwrap());
        assert!(join_columns(&[x, other]).is_err());
    }
}
