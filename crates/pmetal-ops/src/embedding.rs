//! Rows of a table: `y[t] = table[ids[t]]`, `table [vocab, hidden]`; backward adds each row's gradient to its place.

use candle_core::{DType, Device, Tensor};
use pmetal_metal::{Gpu, Grid, empty, kernels};

use crate::{
    Error, Param, Result, Value, Weight,
    autograd::{one, only, recording},
    elementwise::{converted, rows_in_quads},
    kernel::{CpuElement, View, for_dtype, room, tensor},
    place::{Place, gpu_of, place, upload},
    profile,
};

const OP: &str = "embedding";

/// Looks up `ids` and returns `[ids.len(), hidden]` in `dtype`.
///
/// # Errors
/// Where an id is not below the vocabulary's size.
pub fn embedding(ids: &[u32], table: &Weight, dtype: DType, device: &Device) -> Result<Value> {
    let _span = profile::span(OP);
    let (vocab, width) = table.shape().dims2()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::operand(OP, "token id", format!("below {vocab}"), id));
    }
    let y = match table {
        // a mapped or packed table is on the host, and stays there
        Weight::Mapped(_) | Weight::Packed(..) if gpu_of(&Device::Cpu)?.is_none() => {
            gather_on_cpu(ids, table, width, dtype)?.to_device(device)?
        }
        _ => {
            let table_t = table.tensor()?;
            match place(&table_t, OP)? {
                Place::Cpu => gather_on_cpu(ids, table, width, dtype)?,
                Place::Gpu(gpu) => {
                    let ids = upload(ids, table_t.device())?;
                    converted(&gather_on_gpu(&*gpu, &ids, &table_t.contiguous()?)?, dtype)?
                }
                Place::Reference => reference(ids, &table_t)?.to_dtype(dtype)?,
            }
        }
    };
    let Some(param) = table.param().filter(|_| recording()).cloned() else { return Ok(Value::constant(y)) };
    let ids = ids.to_vec();
    Ok(one(Value::record_if(true, vec![y], &[], move |grads| {
        let dy = only(grads, OP)?.contiguous()?;
        match place(&dy, OP)? {
            Place::Cpu => {
                let view = View::of_tensor(&dy, OP)?;
                for_dtype!(OP, dy.dtype(), T => {
                    let dy = view.slice::<T>()?;
                    param.accumulate_grad(|g| pmetal_cpu::scatter_add_rows(dy, &ids, width, g))
                })?;
            }
            Place::Gpu(gpu) => scatter_on_gpu(&*gpu, &dy, &ids, &param)?,
            Place::Reference => {
                let ids = upload(&ids, dy.device())?;
                let zeros = Tensor::zeros((vocab, width), DType::F32, dy.device())?;
                param.add_grad(&zeros.index_add(&ids, &dy.to_dtype(DType::F32)?, 0)?)?;
            }
        }
        Ok(vec![])
    })))
}

fn gather_on_cpu(ids: &[u32], table: &Weight, width: usize, dtype: DType) -> Result<Tensor> {
    let view = table.view()?;
    if let View::Packed(table) = view {
        return for_dtype!(OP, dtype, T => {
            let mut y = room::<T>(ids.len() * width);
            table.gather_rows(ids, &mut y);
            tensor(y, (ids.len(), width))
        });
    }
    for_dtype!(OP, view.dtype(), W => for_dtype!(OP, dtype, T => gather::<W, T>(ids, view.slice::<W>()?, width)))
}

fn gather<W: CpuElement, T: CpuElement>(ids: &[u32], table: &[W], width: usize) -> Result<Tensor> {
    let mut y = room::<T>(ids.len() * width);
    pmetal_cpu::gather_rows(table, ids, width, &mut y);
    tensor(y, (ids.len(), width))
}

/// Threads of a threadgroup that has a row.
fn threads_of_row(width: usize) -> usize {
    width.div_ceil(4).next_multiple_of(32).clamp(32, 256)
}

/// The rows of `table [vocab, width]` that `ids [n]` (u32) name, which are below `vocab`: `[n, width]`.
pub(crate) fn gather_on_gpu(gpu: &dyn Gpu, ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let y = empty((ids.elem_count(), table.dim(1)?), table.dtype(), table.device())?;
    gather_into(gpu, ids, table, &y)?;
    Ok(y)
}

/// The same into `y`.
pub(crate) fn gather_into(gpu: &dyn Gpu, ids: &Tensor, table: &Tensor, y: &Tensor) -> Result<()> {
    let (n, width) = (ids.elem_count(), table.dim(1)?);
    let quads = rows_in_quads(width, &[table]) * width as u32 / 4;
    let params = kernels::EmbeddingParams { width: width as u32, quads };
    let grid = Grid::line(n, threads_of_row(width));
    Ok(kernels::embedding(gpu, table.dtype(), grid, table, ids, y, params)?)
}

fn scatter_on_gpu(gpu: &dyn Gpu, dy: &Tensor, ids: &[u32], param: &Param) -> Result<()> {
    let width = dy.dim(1)?;
    let grad = param.grad_sum()?;
    let (unique, groups) = tokens_by_id(ids);
    let quads = rows_in_quads(width, &[dy, grad]) * width as u32 / 4;
    let params = kernels::EmbeddingGradParams { width: width as u32, quads, unique: unique as u32 };
    let grid = Grid::line(unique, threads_of_row(width));
    Ok(kernels::embedding_grad(gpu, dy.dtype(), grid, dy, &upload(&groups, dy.device())?, grad, params)?)
}

/// How many ids there are; and behind one another those ids, where the tokens of each begin and the last ends, the tokens.
fn tokens_by_id(ids: &[u32]) -> (usize, Vec<u32>) {
    let mut order: Vec<(u32, u32)> = ids.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let (mut groups, mut starts) = (Vec::new(), vec![0]);
    for group in order.chunk_by(|a, b| a.0 == b.0) {
        groups.push(group[0].0);
        starts.push(starts[starts.len() - 1] + group.len() as u32);
    }
    let unique = groups.len();
    groups.extend(starts);
    groups.extend(order.iter().map(|(_, token)| token));
    (unique, groups)
}

/// The look-up in plain candle.
fn reference(ids: &[u32], table: &Tensor) -> candle_core::Result<Tensor> {
    table.index_select(&Tensor::new(ids, table.device())?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Arena, gradients,
        testing::{assert_close, emulated, random},
    };

    #[test]
    fn rows_and_the_gradient_of_a_repeated_row() {
        let table = random(&[7, 5], 1).to_dtype(DType::F32).unwrap();
        let ids = [3, 0, 3, 6];
        let arena = Arena::new(&[("table".into(), table.shape().clone())], DType::F32, &Device::Cpu).unwrap();
        let param = arena.param("table").unwrap();
        param.set(&table).unwrap();
        let y = embedding(&ids, &Weight::Trainable(param.clone()), DType::F32, &Device::Cpu).unwrap();
        assert_close(&reference(&ids, &table).unwrap(), y.tensor(), 0.0, "rows");

        let dy = random(&[4, 5], 2).to_dtype(DType::F32).unwrap();
        gradients(vec![(y, dy.clone())], &[]).unwrap();
        let (grad, dy) = (param.grad().unwrap().to_vec2::<f32>().unwrap(), dy.to_vec2::<f32>().unwrap());
        for c in 0..5 {
            assert!((grad[3][c] - (dy[0][c] + dy[2][c])).abs() < 1e-6);
            assert_eq!(grad[0][c], dy[1][c]);
            assert_eq!(grad[1][c], 0.0);
        }
    }

    #[test]
    fn rows_and_gradients_on_a_gpu() {
        for (width, dtype) in [(1, DType::F32), (24, DType::BF16), (130, DType::F16), (1030, DType::F32)] {
            let table = random(&[9, width], 1).to_dtype(DType::F32).unwrap();
            let ids: Vec<u32> = (0..40).map(|i| i * i % 9).collect();
            let run = || {
                // a parameter before the table, so that the table's gradient begins at an odd place
                let params = [("first".into(), 3.into()), ("table".into(), table.shape().clone())];
                let arena = Arena::new(&params, dtype, &Device::Cpu).unwrap();
                let param = arena.param("table").unwrap();
                param.set(&table).unwrap();
                for seed in [2, 3] {
                    let y = embedding(&ids, &Weight::Trainable(param.clone()), dtype, &Device::Cpu).unwrap();
                    let rows = reference(&ids, param.value()).unwrap();
                    assert_close(&rows, y.tensor(), 0.0, "rows");
                    gradients(vec![(y, random(&[40, width], seed).to_dtype(dtype).unwrap())], &[]).unwrap();
                }
                param.grad().unwrap()
            };
            assert_close(&run(), &emulated(run), 2e-5, "gradient");
        }
    }

    #[test]
    fn an_id_outside_the_vocabulary_is_refused() {
        let table = Weight::Frozen(random(&[7, 5], 1).to_dtype(DType::F32).unwrap());
        let error = embedding(&[7], &table, DType::F32, &Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("token id is 7"), "{error}");
    }
}
