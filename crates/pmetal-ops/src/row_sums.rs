//! Rows by their numbers, and sums of rows with weights: how tokens come to their experts and back.
//!
//! Everything here is `y[r] = Σ w[e] x[rows[e]]` over the entries `e` of a list of row `r`, added in their order in f32 and rounded once. The
//! gradient of `x` is the same with the lists turned round, that of a weight the product of two rows; so nothing depends on the order in which
//! threads come, on no device.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use pmetal_cpu::RowLists;
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Error, Result,
    autograd::{Value, composite, one, only},
    elementwise::{pitch_of, readable, rows_in_quads},
    kernel::{View, for_dtype, room, tensor},
    place::{Place, place, upload},
    profile,
    rows::{GradPlace, empty_rows},
};

const OP: &str = "row_sums";

/// The rows of `x [n, width]` that `rows` names, `[rows.len(), width]`. A row may be named several times: its gradient is the sum.
///
/// # Errors
/// Where a number is not below `n`.
pub fn gather_rows(x: &Value, rows: &[u32]) -> Result<Value> {
    row_sums(x, None, Lists::gather(rows), 0)
}

/// `y[t] = Σ weights[t, j] x[places[t k + j]]`: `x [n, width]`, `weights [tokens, k]` f32, `places` of `tokens * k` row numbers of `x`; returns
/// `[tokens, width]` in the dtype of `x`. Gradients flow to both.
///
/// # Errors
/// Where the operands do not fit one another.
pub fn combine_rows(x: &Value, weights: &Value, places: &[u32]) -> Result<Value> {
    let (tokens, k) = weights.tensor().dims2()?;
    if places.len() != tokens * k {
        return Err(Error::operand(OP, "number of places", tokens * k, places.len()));
    }
    row_sums(x, Some(weights), Lists::sums(places, k), 0)
}

/// What each row of a result is the sum of; see [`RowLists`].
#[derive(Clone, Debug)]
pub(crate) struct Lists {
    starts: Vec<u32>,
    rows: Vec<u32>,
    weights: Vec<u32>,
}

impl Lists {
    /// One row each.
    pub(crate) fn gather(rows: &[u32]) -> Self {
        Self::sums(rows, 1)
    }

    /// One row each, times the weight whose number stands beside it; each weight once.
    pub(crate) fn gather_weighted(rows: &[u32], weights: &[u32]) -> Self {
        Self { weights: weights.to_vec(), ..Self::gather(rows) }
    }

    /// `k` rows each, with the weights in their order.
    pub(crate) fn sums(rows: &[u32], k: usize) -> Self {
        let n = rows.len() as u32;
        let starts = (0..=n).step_by(k.max(1)).collect();
        Self { starts, rows: rows.to_vec(), weights: (0..n).collect() }
    }

    /// How many rows the result has.
    fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The row of the result that each entry belongs to.
    fn owners(&self) -> Vec<u32> {
        let ranges = self.starts.windows(2).zip(0..);
        ranges.flat_map(|(range, row)| std::iter::repeat_n(row, (range[1] - range[0]) as usize)).collect()
    }

    /// From the result to a source of `n` rows: the entries that read a row, in their order.
    fn turned(&self, n: usize) -> Self {
        let owners = self.owners();
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        order.sort_by_key(|&e| self.rows[e]);
        let mut starts = vec![0u32; n + 1];
        self.rows.iter().for_each(|&row| starts[row as usize + 1] += 1);
        for row in 0..n {
            starts[row + 1] += starts[row];
        }
        let pick = |of: &[u32]| order.iter().map(|&e| of[e]).collect();
        Self { starts, rows: pick(&owners), weights: pick(&self.weights) }
    }

    fn on_cpu(&self) -> RowLists<'_> {
        RowLists { starts: &self.starts, rows: &self.rows, weights: &self.weights }
    }

    fn uploaded(&self, device: &Device) -> Result<Tensor> {
        upload(&[&self.starts[..], &self.rows, &self.weights].concat(), device)
    }

    fn check(&self, x: &Tensor, weights: Option<&Tensor>) -> Result<()> {
        let (n, _) = x.dims2()?;
        if let Some(row) = self.rows.iter().find(|&&row| row as usize >= n) {
            return Err(Error::operand(OP, "row", format!("below {n}"), row));
        }
        match weights {
            Some(weights) if weights.elem_count() != self.rows.len() => {
                Err(Error::operand(OP, "number of weights", self.rows.len(), weights.elem_count()))
            }
            Some(weights) if !matches!(weights.dtype(), DType::F32 | DType::F64) => {
                Err(Error::operand(OP, "dtype of weights", DType::F32, weights.dtype()))
            }
            _ => Ok(()),
        }
    }
}

/// The sums that `lists` names, `[lists, width]`; on a GPU with `spare` free columns behind each row. Lists made forward are of one length.
pub(crate) fn row_sums(x: &Value, weights: Option<&Value>, lists: Lists, spare: usize) -> Result<Value> {
    let _span = profile::span(OP);
    lists.check(x.tensor(), weights.map(Value::tensor))?;
    let inputs: Vec<&Value> = std::iter::once(x).chain(weights).collect();
    let gpu = match place(x.tensor(), OP)? {
        Place::Cpu => None,
        Place::Gpu(gpu) => Some(gpu),
        Place::Reference => return Ok(one(composite(&inputs, move |t| Ok(vec![reference(t, &lists)?]))?)),
    };
    let x_t = if gpu.is_some() { readable(x.tensor())? } else { x.tensor().contiguous()? };
    let weights_t = weights.map(|weights| weights.tensor().contiguous()).transpose()?;
    let (y, spare_rows) = match &gpu {
        None => (sums(&x_t, weights_t.as_ref(), &lists)?, None),
        Some(gpu) => {
            let y = empty_rows(lists.len(), x_t.dim(1)?, spare, x_t.dtype(), x_t.device())?;
            sums_on_gpu(&**gpu, &x_t, weights_t.as_ref(), &lists, &y.rows)?;
            (y.rows.clone(), Some(y))
        }
    };
    profile::moved(&[&x_t, &y]);
    let saved = Backward {
        shape: x_t.dims2()?,
        x: weights.is_some_and(Value::requires_grad).then(|| x_t.clone()),
        weights: weights_t,
        lists,
        gpu,
        place: x.requires_grad().then(|| x.grad_place()),
    };
    let value = one(Value::record(vec![y], &inputs, move |grads| saved.run(&only(grads, OP)?)));
    Ok(match spare_rows {
        Some(rows) => rows.attach(value),
        None => value,
    })
}

/// What the backward needs.
struct Backward {
    /// Of the source.
    shape: (usize, usize),
    /// The source, where its weights have a gradient.
    x: Option<Tensor>,
    weights: Option<Tensor>,
    lists: Lists,
    gpu: Option<Arc<dyn Gpu>>,
    /// Of the source's gradient, where it has one.
    place: Option<GradPlace>,
}

impl Backward {
    fn run(&self, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let dy = if self.gpu.is_some() { readable(dy)? } else { dy.contiguous()? };
        profile::moved(&[&dy]);
        let dx = self.place.as_ref().map(|place| self.of_source(&dy, place)).transpose()?;
        let Some(weights) = &self.weights else { return Ok(vec![dx]) };
        let dots = match (&self.x, &self.gpu) {
            (None, _) => None,
            (Some(x), None) => Some(dots(&dy, x, &self.lists)?.reshape(weights.shape())?),
            (Some(x), Some(gpu)) => Some(dots_on_gpu(&**gpu, &dy, x, &self.lists)?.reshape(weights.shape())?),
        };
        Ok(vec![dx, dots])
    }

    fn of_source(&self, dy: &Tensor, place: &GradPlace) -> Result<Tensor> {
        let turned = self.lists.turned(self.shape.0);
        let Some(gpu) = &self.gpu else { return sums(dy, self.weights.as_ref(), &turned) };
        let dx = place.empty(self.shape, dy.dtype(), dy.device())?;
        sums_on_gpu(&**gpu, dy, self.weights.as_ref(), &turned, &dx)?;
        Ok(dx)
    }
}

fn sums(x: &Tensor, weights: Option<&Tensor>, lists: &Lists) -> Result<Tensor> {
    let width = x.dim(1)?;
    let (xv, wv) = (View::of_tensor(x, OP)?, weights.map(|w| View::of_tensor(w, OP)).transpose()?);
    let weights = wv.as_ref().map(|w| w.slice::<f32>()).transpose()?;
    for_dtype!(OP, x.dtype(), T => {
        let mut y = room::<T>(lists.len() * width);
        pmetal_cpu::sum_rows(xv.slice::<T>()?, lists.on_cpu(), weights, width, &mut y);
        tensor(y, (lists.len(), width))
    })
}

fn dots(dy: &Tensor, x: &Tensor, lists: &Lists) -> Result<Tensor> {
    let (d, xv, width) = (View::of_tensor(dy, OP)?, View::of_tensor(x, OP)?, x.dim(1)?);
    for_dtype!(OP, x.dtype(), T => {
        let mut dots = room::<f32>(lists.rows.len());
        pmetal_cpu::dot_rows(d.slice::<T>()?, xv.slice::<T>()?, lists.on_cpu(), width, &mut dots);
        tensor(dots, lists.rows.len())
    })
}

/// Fills `y [lists, width]`.
fn sums_on_gpu(gpu: &dyn Gpu, x: &Tensor, weights: Option<&Tensor>, lists: &Lists, y: &Tensor) -> Result<()> {
    let (rows, width) = (lists.len(), x.dim(1)?);
    let params = kernels::SumRowsParams {
        width: width as u32,
        quads: rows_in_quads(width, &[x, y]) * width as u32 / 4,
        rows: rows as u32,
        entries: lists.rows.len() as u32,
        x_pitch: pitch_of(x),
        y_pitch: pitch_of(y),
    };
    let grid = Grid::line(rows, width.div_ceil(4).next_multiple_of(32).clamp(32, 256));
    let numbers = lists.uploaded(x.device())?;
    match weights {
        None => Ok(kernels::sum_rows(gpu, x.dtype(), grid, x, &numbers, y, params)?),
        Some(weights) => Ok(kernels::sum_weighted_rows(gpu, x.dtype(), grid, x, &numbers, weights, y, params)?),
    }
}

fn dots_on_gpu(gpu: &dyn Gpu, dy: &Tensor, x: &Tensor, lists: &Lists) -> Result<Tensor> {
    const ENTRIES: usize = 8;
    let (entries, width) = (lists.rows.len(), x.dim(1)?);
    let dots = empty(entries, DType::F32, x.device())?;
    let numbers = upload(&[&lists.owners()[..], &lists.rows, &lists.weights].concat(), x.device())?;
    let (dy_pitch, x_pitch) = (pitch_of(dy), pitch_of(x));
    let params = kernels::DotRowsParams { width: width as u32, entries: entries as u32, dy_pitch, x_pitch };
    let grid = Grid::line(entries.div_ceil(ENTRIES), 32 * ENTRIES);
    kernels::dot_rows(gpu, x.dtype(), grid, dy, x, &numbers, &dots, params)?;
    Ok(dots)
}

/// The formula in plain candle, for lists of one length: `t` is the source and, where there are any, the weights.
fn reference(t: &[Tensor], lists: &Lists) -> candle_core::Result<Tensor> {
    let (device, dtype, rows) = (t[0].device(), t[0].dtype(), lists.len());
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let numbers = |of: &[u32]| Tensor::from_slice(of, of.len(), device);
    let mut entries = t[0].to_dtype(wide)?.index_select(&numbers(&lists.rows)?, 0)?;
    if let Some(weights) = t.get(1) {
        let weights = weights.flatten_all()?.to_dtype(wide)?.index_select(&numbers(&lists.weights)?, 0)?;
        entries = entries.broadcast_mul(&weights.unsqueeze(1)?)?;
    }
    let (n, width) = entries.dims2()?;
    entries.reshape((rows, n / rows.max(1), width))?.sum(1)?.to_dtype(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_columns, check_op, random};

    /// Weights come in f32, whatever the rows are.
    fn wide(weights: &Value) -> Result<Value> {
        let to = if weights.tensor().dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        Ok(one(composite(&[weights], move |t| Ok(vec![t[0].to_dtype(to)?]))?))
    }

    #[test]
    fn gathered_rows_and_the_sums_of_their_gradients() {
        for width in [1, 24, 130, 1030] {
            // some rows often, some never
            let rows: Vec<u32> = (0..13).map(|i| i * i % 7).collect();
            let lists = Lists::gather(&rows);
            check_op(
                &[random(&[9, width], 1)],
                move |t| Ok(vec![reference(t, &lists)?]),
                |v| Ok(vec![gather_rows(&v[0], &rows)?]),
            );
        }
    }

    #[test]
    fn combined_rows_and_gradients_of_rows_and_weights() {
        for (tokens, k, width) in [(1, 1, 1), (5, 2, 24), (4, 3, 130), (7, 8, 520)] {
            let n = tokens * k + 2;
            let places: Vec<u32> = (0..tokens * k).map(|i| (i * 5 % n) as u32).collect();
            let lists = Lists::sums(&places, k);
            check_op(
                &[random(&[n, width], 1), random(&[tokens, k], 2)],
                move |t| Ok(vec![reference(t, &lists)?]),
                |v| Ok(vec![combine_rows(&v[0], &wide(&v[1])?, &places)?]),
            );
        }
    }

    #[test]
    fn rows_times_their_weights() {
        let (rows, numbers) = ([2, 0, 1, 2, 0, 1], [5, 0, 3, 4, 1, 2]);
        let lists = Lists::gather_weighted(&rows, &numbers);
        let expected = lists.clone();
        check_op(
            &[random(&[3, 40], 1), random(&[3, 2], 2)],
            move |t| Ok(vec![reference(t, &expected)?]),
            |v| Ok(vec![row_sums(&v[0], Some(&wide(&v[1])?), lists.clone(), 8)?]),
        );
    }

    #[test]
    fn columns_of_wider_matrices() {
        for width in [24, 17] {
            let places = [3, 0, 2, 3, 1, 4];
            check_columns(&[random(&[5, width], 1)], &[0], |v| Ok(vec![gather_rows(&v[0], &places)?]));
            check_columns(&[random(&[5, width], 1)], &[0], |v| {
                let weights = Value::constant(random(&[3, 2], 2).to_dtype(DType::F32)?);
                Ok(vec![combine_rows(&v[0], &weights, &places)?])
            });
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let value = |shape: &[usize]| Value::constant(random(shape, 1).to_dtype(DType::F32).unwrap());
        let error = gather_rows(&value(&[3, 4]), &[0, 3]).err().unwrap().to_string();
        assert!(error.contains("row is 3") && error.contains("below 3"), "{error}");
        assert!(combine_rows(&value(&[3, 4]), &value(&[2, 2]), &[0, 1, 2]).is_err());
    }
}
