//! Quantized tensors of safetensors files: numbers of 8 or 4 bits, and the scales of their blocks beside them.
//!
//! Both kinds are presented as the tensor they stand for, under its name, and decoded when they are read, a matrix at a time.

mod fp8;
mod mxfp4;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use candle_core::{DType, Device, Shape, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::{Error, Result, keys::Keys, safetensors_folder::Entry};

/// What a file calls the scales of an fp8 tensor, behind the tensor's name.
const FP8_SCALES: &str = "_scale_inv";
/// The same for the blocks and scales of an mxfp4 tensor.
const MXFP4: [&str; 2] = ["_blocks", "_scales"];
/// Rows and columns of a block of fp8 numbers where `weight_block_size` says nothing.
const BLOCK: [usize; 2] = [128, 128];

/// How the bytes of a tensor become numbers.
pub(crate) struct Packing {
    scales: Box<Entry>,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Fp8 { block: [usize; 2] },
    Mxfp4,
}

impl Packing {
    /// Lets go of the pages of the scales.
    pub(crate) fn release(&self) {
        self.scales.release();
    }

    /// Matrix `index` of `entry [n, d1, d2]`, or the one there is of `[d1, d2]`: `[d1, d2]`, or `[d2, d1]` where `transposed`; in bf16, or in f32
    /// where that is `dtype`.
    pub(crate) fn matrix(&self, entry: &Entry, index: usize, transposed: bool, dtype: DType) -> Result<Tensor> {
        let matrices = if let &[n, _, _] = entry.shape.dims() { n } else { 1 };
        let bytes = nth(entry.bytes(), index, matrices);
        let (Some(&[d1, d2]), Some(bytes)) = (entry.shape.dims().last_chunk(), bytes) else {
            return Err(Error::Input { reason: format!("matrix {index} of a tensor {:?}", entry.shape.dims()) });
        };
        match self.kind {
            Kind::Fp8 { block } => {
                let scales = floats(&self.scales);
                let scales = nth(&scales, index, matrices).unwrap_or_default();
                match dtype {
                    DType::F32 => arranged(fp8::decode(bytes, scales, d2, block, |x| x), d1, d2, transposed),
                    _ => arranged(fp8::decode(bytes, scales, d2, block, bf16::from_f32), d1, d2, transposed),
                }
            }
            // no bit is lost in bf16
            Kind::Mxfp4 => {
                let scales = nth(self.scales.bytes(), index, matrices).unwrap_or_default();
                arranged(mxfp4::decode(bytes, scales), d2, d1, !transposed)
            }
        }
    }

    /// All of `entry`, a matrix at a time.
    pub(crate) fn tensor(&self, entry: &Entry, dtype: DType) -> Result<Tensor> {
        let &[matrices, ..] = entry.shape.dims() else {
            return Ok(Tensor::zeros(&entry.shape, DType::BF16, &Device::Cpu)?);
        };
        if entry.shape.rank() == 2 {
            return self.matrix(entry, 0, false, dtype);
        }
        let matrices: Vec<Tensor> =
            (0..matrices).map(|index| self.matrix(entry, index, false, dtype)).collect::<Result<_>>()?;
        Ok(Tensor::stack(&matrices, 0)?)
    }
}

/// `numbers [rows, width]` as a tensor, or their transpose.
fn arranged<T: WithDType + Default>(numbers: Vec<T>, rows: usize, width: usize, turned: bool) -> Result<Tensor> {
    Ok(match turned {
        false => Tensor::from_vec(numbers, (rows, width), &Device::Cpu)?,
        true => Tensor::from_vec(transpose(&numbers, width), (width, rows), &Device::Cpu)?,
    })
}

/// Part `index` of `n` equal ones.
fn nth<T>(all: &[T], index: usize, n: usize) -> Option<&[T]> {
    let part = all.len().checked_div(n)?;
    all.get(index.checked_mul(part)?..)?.get(..part)
}

/// Puts the parts of quantized tensors together: what is left are tensors under the names of the unquantized model. `config` is that of
/// the model, for the size of blocks.
///
/// # Errors
/// Where scales do not fit what they scale.
pub(crate) fn join(tensors: &mut HashMap<String, Entry>, config: &Value) -> Result<()> {
    let block = block_size(config)?;
    let mut names: Vec<String> = tensors.keys().cloned().collect();
    names.sort_unstable();
    for name in names {
        if let Some(base) = name.strip_suffix(FP8_SCALES)
            && tensors.get(base).is_some_and(|entry| entry.stored == Dtype::F8_E4M3)
            && let (Some(scales), Some(entry)) = (tensors.remove(&name), tensors.get_mut(base))
        {
            check_fp8(base, entry, &scales, block)?;
            entry.packing = Some(Packing { scales: Box::new(scales), kind: Kind::Fp8 { block } });
        } else if let Some(base) = name.strip_suffix(MXFP4[0])
            && tensors.get(&name).is_some_and(|entry| entry.stored == Dtype::U8)
            && let Some(scales) = tensors.remove(&format!("{base}{}", MXFP4[1]))
            && let Some(mut entry) = tensors.remove(&name)
        {
            entry.shape = mxfp4_shape(base, &entry, &scales)?;
            entry.packing = Some(Packing { scales: Box::new(scales), kind: Kind::Mxfp4 });
            let path = entry.path.clone();
            if tensors.insert(base.to_owned(), entry).is_some() {
                let reason = format!("tensor {base} is there twice, once as {name}; fetch the model again");
                return Err(Error::broken(&path, reason));
            }
        }
    }
    Ok(())
}

/// `weight_block_size` of the configuration.
fn block_size(config: &Value) -> Result<[usize; 2]> {
    const KEY: &str = "weight_block_size";
    let Some(keys) = Keys::new(config).object("quantization_config")? else { return Ok(BLOCK) };
    let stated = &config["quantization_config"][KEY];
    if stated.is_null() {
        return Ok(BLOCK);
    }
    let size = |size: &Value| size.as_u64().filter(|n| (1..=1 << 26).contains(n)).map(|n| n as usize);
    let sizes: Option<Vec<usize>> = stated.as_array().and_then(|sizes| sizes.iter().map(size).collect());
    let sizes = sizes.and_then(|sizes| <[usize; 2]>::try_from(sizes).ok());
    sizes.ok_or_else(|| keys.refuse(KEY, format!("expected two whole numbers from 1 on, found {stated}")))
}

/// The scales of `[.., rows, columns]` are `[.., rows / block, columns / block]`, rounded up.
fn check_fp8(name: &str, entry: &Entry, scales: &Entry, block: [usize; 2]) -> Result<()> {
    let (&[.., rows, width], 2 | 3) = (entry.shape.dims(), entry.shape.rank()) else {
        let reason = format!("tensor {name} is {:?}: only matrices have scales by block", entry.shape.dims());
        return Err(Error::broken(&entry.path, reason));
    };
    let mut expected = entry.shape.dims().to_vec();
    expected.truncate(expected.len() - 2);
    expected.extend([rows.div_ceil(block[0]), width.div_ceil(block[1])]);
    let is_number = matches!(scales.stored, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F8_E8M0);
    if scales.shape.dims() == expected && is_number {
        return Ok(());
    }
    let reason = format!(
        "tensor {name}{FP8_SCALES} is {:?} {:?}, expected F32 {expected:?}: a scale for each block {block:?} of {name}",
        scales.stored,
        scales.shape.dims()
    );
    Err(Error::broken(&scales.path, reason))
}

/// The shape that blocks `[n, rows, groups, 16]` stand for, given scales `[n, rows, groups]`: `[n, groups * 32, rows]`, as the unquantized
/// file has it.
fn mxfp4_shape(name: &str, blocks: &Entry, scales: &Entry) -> Result<Shape> {
    if let &[n, rows, groups, mxfp4::BYTES] = blocks.shape.dims()
        && scales.shape.dims() == [n, rows, groups]
        && scales.stored == Dtype::U8
        && let Some(width) = groups.checked_mul(mxfp4::NUMBERS)
    {
        return Ok(Shape::from((n, width, rows)));
    }
    let [blocks_end, scales_end] = MXFP4;
    let reason = format!(
        "tensors {name}{blocks_end} {:?} and {name}{scales_end} {:?} {:?}: expected U8 [n, rows, groups, {}] and U8 [n, rows, groups]",
        blocks.shape.dims(),
        scales.stored,
        scales.shape.dims(),
        mxfp4::BYTES
    );
    Err(Error::broken(&blocks.path, reason))
}

/// The numbers of a tensor of scales.
fn floats(entry: &Entry) -> Vec<f32> {
    let bytes = entry.bytes();
    let halves = bytes.as_chunks::<2>().0.iter().copied();
    match entry.stored {
        Dtype::BF16 => halves.map(|x| bf16::from_le_bytes(x).to_f32()).collect(),
        Dtype::F16 => halves.map(|x| f16::from_le_bytes(x).to_f32()).collect(),
        Dtype::F8_E8M0 => bytes.iter().map(|&x| mxfp4::power(x)).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
    }
}

/// Rows of the result that a task makes.
const TILE: usize = 32;

/// The transpose of a matrix whose rows have `width` elements.
pub(crate) fn transpose<T: Copy + Default + Send + Sync>(x: &[T], width: usize) -> Vec<T> {
    let rows = x.len().checked_div(width).unwrap_or_default();
    let mut y = vec![T::default(); rows * width];
    y.par_chunks_mut((rows * TILE).max(1)).enumerate().for_each(|(tile, y)| {
        for (row, x) in x.chunks_exact(width).enumerate() {
            for (x, y) in x[tile * TILE..].iter().zip(y.chunks_exact_mut(rows)) {
                y[row] = *x;
            }
        }
    });
    y
}
