//! Rows of a table: `y[t] = table[ids[t]]`, `table [vocab, hidden]`; backward adds each row's gradient to its place.

use candle_core::{DType, Device, Tensor};

use crate::{
    Error, Result, Value, Weight,
    autograd::{one, only, recording},
    kernel::{CpuElement, View, for_dtype, has_cpu_kernel, room, tensor},
};

const OP: &str = "embedding";

/// Looks up `ids` and returns `[ids.len(), hidden]` in `dtype`.
///
/// # Errors
/// Where an id is not below the vocabulary's size.
pub fn embedding(ids: &[u32], table: &Weight, dtype: DType, device: &Device) -> Result<Value> {
    let (vocab, width) = table.shape().dims2()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::operand(OP, "token id", format!("below {vocab}"), id));
    }
    let y = match table {
        Weight::Mapped(_) => gather_on_cpu(ids, table, width, dtype)?.to_device(device)?,
        Weight::Frozen(t) if has_cpu_kernel(t) => gather_on_cpu(ids, table, width, dtype)?,
        Weight::Trainable(p) if has_cpu_kernel(p.value()) => gather_on_cpu(ids, table, width, dtype)?,
        _ => reference(ids, &table.tensor()?)?.to_dtype(dtype)?,
    };
    let Some(param) = table.param().filter(|_| recording()).cloned() else { return Ok(Value::constant(y)) };
    let ids = ids.to_vec();
    Ok(one(Value::record_if(true, vec![y], &[], move |grads| {
        let dy = only(grads, OP)?.contiguous()?;
        if has_cpu_kernel(&dy) {
            let view = View::of_tensor(&dy, OP)?;
            for_dtype!(OP, dy.dtype(), T => {
                let dy = view.slice::<T>()?;
                param.accumulate_grad(|g| pmetal_cpu::scatter_add_rows(dy, &ids, width, g))
            })?;
        } else {
            let ids = Tensor::from_vec(ids, dy.dim(0)?, dy.device())?;
            let zeros = Tensor::zeros((vocab, width), DType::F32, dy.device())?;
            param.add_grad(&zeros.index_add(&ids, &dy.to_dtype(DType::F32)?, 0)?)?;
        }
        Ok(vec![])
    })))
}

fn gather_on_cpu(ids: &[u32], table: &Weight, width: usize, dtype: DType) -> Result<Tensor> {
    let view = table.view()?;
    for_dtype!(OP, view.dtype(), W => for_dtype!(OP, dtype, T => gather::<W, T>(ids, view.slice::<W>()?, width)))
}

fn gather<W: CpuElement, T: CpuElement>(ids: &[u32], table: &[W], width: usize) -> Result<Tensor> {
    let mut y = room::<T>(ids.len() * width);
    pmetal_cpu::gather_rows(table, ids, width, &mut y);
    tensor(y, (ids.len(), width))
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
        testing::{assert_close, random},
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
    fn an_id_outside_the_vocabulary_is_refused() {
        let table = Weight::Frozen(random(&[7, 5], 1).to_dtype(DType::F32).unwrap());
        let error = embedding(&[7], &table, DType::F32, &Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("token id is 7"), "{error}");
    }
}
