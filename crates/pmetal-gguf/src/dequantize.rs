use std::ops::Range;

use candle_core::{DType, Device, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::file::TensorInfo;
use crate::{GgufFile, Result};

/// Numbers decoded at once by one thread: few enough to stay in its cache.
const CHUNK: usize = 1 << 15;

/// A number tensors are made of, rounded from the f32 the block codecs give.
trait Target: WithDType {
    fn store(from: &[f32], into: &mut [Self]);
}

impl Target for f32 {
    fn store(from: &[f32], into: &mut [Self]) {
        into.copy_from_slice(from);
    }
}

impl Target for bf16 {
    /// Rounds to nearest, ties to even, as `bf16::from_f32` does, but without its branches, so that it runs in vectors:
    /// five times faster.
    fn store(from: &[f32], into: &mut [Self]) {
        for (into, from) in into.iter_mut().zip(from) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            let quiet_nan = bits | 0x0040_0000;
            *into = Self::from_bits(((if from.is_nan() { quiet_nan } else { rounded }) >> 16) as u16);
        }
    }
}

impl Target for f16 {
    fn store(from: &[f32], into: &mut [Self]) {
        into.convert_from_f32_slice(from);
    }
}

/// What conversion to GGUF did to a tensor, to be undone.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    None,
    /// One was added to every number.
    OneAdded,
    /// Rows were reordered: in attention heads of that many rows each, rotary pairs lie side by side in the file (row `2i` with
    /// `2i + 1`) and half a head apart in the result (row `i` with `i + rows / 2`).
    PairsAdjacent {
        /// Rows of one head, an even number.
        head_rows: usize,
    },
}

/// The stored row of the result's row `row`, both counted from the start of a head of `head_rows`.
fn source(head_rows: usize, row: usize) -> usize {
    let half = head_rows / 2;
    let head = row / head_rows;
    let within = row % head_rows;
    head * head_rows + 2 * (within % half) + within / half
}

impl GgufFile {
    /// A tensor under its name in the file, decoded into `dtype` (f32, bf16 or f16) on the CPU, as it is stored.
    /// Memory at the peak: the result and a chunk per thread.
    ///
    /// # Errors
    /// When there is no such tensor, or `dtype` is another.
    pub fn dequantize(&self, name: &str, dtype: DType) -> Result<Tensor> {
        self.decode(self.require_tensor(name)?, dtype, Change::None)
    }

    pub(crate) fn decode(&self, tensor: &TensorInfo, dtype: DType, change: Change) -> Result<Tensor> {
        self.decode_numbers(tensor, 0..tensor.shape.iter().product(), &tensor.shape, dtype, change)
    }

    /// Part `index` along the outermost dimension of a tensor of several.
    pub(crate) fn decode_part(&self, tensor: &TensorInfo, index: usize, dtype: DType) -> Result<Tensor> {
        let shape = tensor.shape.get(1..).unwrap_or_default();
        let count: usize = shape.iter().product();
        self.decode_numbers(tensor, index * count..(index + 1) * count, shape, dtype, Change::None)
    }

    fn decode_numbers(
        &self,
        tensor: &TensorInfo,
        numbers: Range<usize>,
        shape: &[usize],
        dtype: DType,
        change: Change,
    ) -> Result<Tensor> {
        let decoded = match dtype {
            DType::F32 => self.decode_into::<f32>(tensor, numbers, shape, change),
            DType::BF16 => self.decode_into::<bf16>(tensor, numbers, shape, change),
            DType::F16 => self.decode_into::<f16>(tensor, numbers, shape, change),
            other => {
                return Err(self.unsupported(format!("decoding weights into {} (f32, bf16 or f16)", other.as_str())));
            }
        };
        decoded.map_err(|source| self.tensor_error(&tensor.name, source))
    }

    fn decode_into<T: Target>(
        &self,
        tensor: &TensorInfo,
        numbers: Range<usize>,
        shape: &[usize],
        change: Change,
    ) -> candle_core::Result<Tensor> {
        let columns = numbers.len() / shape.first().copied().unwrap_or(1);
        let unit = match change {
            Change::PairsAdjacent { head_rows } => head_rows * columns,
            Change::None | Change::OneAdded => tensor.block_type.block_size(),
        };
        let chunk = unit * (CHUNK / unit).max(1);
        let mut decoded = vec![T::zero(); numbers.len()];
        decoded.par_chunks_mut(chunk).enumerate().try_for_each(|(index, into)| {
            let start = numbers.start + index * chunk;
            let blocks = bytes_of(tensor, &(start..start + into.len()));
            let mut stored = tensor.block_type.decode(self.bytes(&blocks))?;
            match change {
                Change::None => T::store(&stored, into),
                Change::OneAdded => {
                    stored.iter_mut().for_each(|number| *number -= 1.0);
                    T::store(&stored, into);
                }
                Change::PairsAdjacent { head_rows } => {
                    for (row, into) in into.chunks_exact_mut(columns).enumerate() {
                        let from = source(head_rows, row) * columns;
                        T::store(stored.get(from..from + columns).unwrap_or_default(), into);
                    }
                }
            }
            Ok::<_, candle_core::Error>(())
        })?;
        self.release(&bytes_of(tensor, &numbers));
        Tensor::from_vec(decoded, shape, &Device::Cpu)
    }
}

/// Where numbers of a tensor lie in the file: a range of whole blocks.
fn bytes_of(tensor: &TensorInfo, numbers: &Range<usize>) -> Range<usize> {
    let block_type = tensor.block_type;
    let byte = |number: usize| tensor.data.start + number / block_type.block_size() * block_type.type_size();
    byte(numbers.start)..byte(numbers.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: usize = 2;
    const HEAD_ROWS: usize = 64;
    const COLUMNS: usize = 768;

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A llama file whose query weights hold 0, 1, 2, ...: three chunks in stored order, two when heads stay together.
    fn counting_file(folder: &std::path::Path) -> GgufFile {
        let mut bytes = [b"GGUF", &3_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &2_u64.to_le_bytes()].concat();
        bytes.extend([string("general.architecture"), 8_u32.to_le_bytes().to_vec(), string("llama")].concat());
        bytes.extend([string("llama.attention.head_count"), 4_u32.to_le_bytes().to_vec()].concat());
        bytes.extend((HEADS as u32).to_le_bytes());
        bytes.extend([string("blk.0.attn_q.weight"), 2_u32.to_le_bytes().to_vec()].concat());
        bytes.extend([COLUMNS as u64, (HEADS * HEAD_ROWS) as u64].map(u64::to_le_bytes).concat());
        bytes.extend([&0_u32.to_le_bytes()[..], &0_u64.to_le_bytes()].concat());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend((0..HEADS * HEAD_ROWS * COLUMNS).flat_map(|number| (number as f32).to_le_bytes()));
        let path = folder.join("counting.gguf");
        std::fs::write(&path, bytes).unwrap();
        GgufFile::open(path).unwrap()
    }

    #[test]
    fn rows_are_in_place_across_chunks() {
        let folder = tempfile::tempdir().unwrap();
        let file = counting_file(folder.path());
        const { assert!(HEAD_ROWS * COLUMNS > CHUNK && HEADS * HEAD_ROWS * COLUMNS > 2 * CHUNK) };
        let stored: Vec<Vec<f32>> = file.dequantize("blk.0.attn_q.weight", DType::F32).unwrap().to_vec2().unwrap();
        let reordered = file.hf_tensor("model.layers.0.self_attn.q_proj.weight", DType::F32).unwrap();
        let reordered: Vec<Vec<f32>> = reordered.to_vec2().unwrap();
        for head in 0..HEADS {
            for pair in 0..HEAD_ROWS / 2 {
                for half in 0..2 {
                    let from = head * HEAD_ROWS + 2 * pair + half;
                    let to = head * HEAD_ROWS + half * HEAD_ROWS / 2 + pair;
                    assert_eq!(reordered[to], stored[from]);
                    assert_eq!(stored[from][7], (from * COLUMNS + 7) as f32);
                }
            }
        }
    }
}
