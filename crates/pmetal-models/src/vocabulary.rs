//! Tables of another number of rows: the embedding and the head of a model whose vocabulary grows.

use std::collections::HashSet;

use candle_core::{DType, Tensor};

use crate::Result;

/// Rows that are summed at a time.
const BLOCK: usize = 4096;

/// `table [n, hidden]` with `rows` rows, in its dtype: cut to the first of them, or longer. Rows behind the last, and those of the ids
/// `fresh`, become the mean of all others: a token that nobody has trained starts where it is neither likely nor unlikely (Hewitt,
/// "Initializing New Word Embeddings for Pretrained Language Models", 2021).
pub fn resize_table(table: &Tensor, rows: usize, fresh: &[u32]) -> Result<Tensor> {
    let n = table.dim(0)?;
    let fresh: HashSet<u32> = fresh.iter().copied().filter(|&id| (id as usize) < n).collect();
    if rows <= n && fresh.is_empty() {
        return Ok(table.narrow(0, 0, rows)?.contiguous()?);
    }
    let mean = mean_row(table, &fresh)?.to_dtype(table.dtype())?;
    let last = n as u32;
    let source = (0..rows as u32).map(|row| if row < last && !fresh.contains(&row) { row } else { last });
    let source = Tensor::from_iter(source, table.device())?;
    Ok(Tensor::cat(&[table, &mean], 0)?.index_select(&source, 0)?)
}

/// The mean of the rows that are not left out, `[1, hidden]` f64.
fn mean_row(table: &Tensor, left_out: &HashSet<u32>) -> Result<Tensor> {
    let (n, width) = table.dims2()?;
    let wide = |start: usize, len: usize| table.narrow(0, start, len)?.to_dtype(DType::F64)?.sum_keepdim(0);
    let mut sum = Tensor::zeros((1, width), DType::F64, table.device())?;
    for start in (0..n).step_by(BLOCK) {
        sum = (sum + wide(start, BLOCK.min(n - start))?)?;
    }
    for &row in left_out {
        sum = (sum - wide(row as usize, 1)?)?;
    }
    let counted = (n - left_out.len()).max(1);
    Ok((sum / counted as f64)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn new_and_fresh_rows_are_the_mean_of_the_rest() {
        let table = Tensor::new(&[[1f32, 2.0], [3.0, 6.0], [100.0, 100.0]], &Device::Cpu).unwrap();
        let resized = |rows, fresh: &[u32]| resize_table(&table, rows, fresh).unwrap().to_vec2::<f32>().unwrap();
        let (first, second, mean) = (vec![1f32, 2.0], vec![3f32, 6.0], vec![2f32, 4.0]);
        assert_eq!(resized(3, &[2]), [first.clone(), second.clone(), mean.clone()]);
        assert_eq!(resized(5, &[2, 3]), [first.clone(), second.clone(), mean.clone(), mean.clone(), mean]);
        assert_eq!(resized(2, &[]), [first, second]);
        assert_eq!(resize_table(&table.to_dtype(DType::BF16).unwrap(), 4, &[]).unwrap().dtype(), DType::BF16);
    }
}
