//! Where a decoder's weights come from.

use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};
use pmetal_ops::{Arena, Weight, random};
use rayon::prelude::*;

use crate::{Checkpoint, Result};

/// A source of weights by Hugging Face name.
pub(crate) trait WeightSource {
    /// The frozen weight.
    fn weight(&self, name: &str, shape: &Shape) -> Result<Weight>;

    /// Called when the weight has been copied and will not be read again.
    fn release(&self, name: &str);
}

/// The weight, trained where the arena has its name.
pub(crate) fn fetch(source: &dyn WeightSource, trainable: Option<&Arena>, name: &str, shape: &Shape) -> Result<Weight> {
    let weight = source.weight(name, shape)?;
    let Some(param) = trainable.and_then(|arena| arena.param(name)) else { return Ok(weight) };
    param.set(&weight.tensor()?)?;
    source.release(name);
    Ok(Weight::Trainable(param))
}

/// Weights of a model on disk.
pub(crate) struct FromCheckpoint<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
}

impl WeightSource for FromCheckpoint<'_> {
    fn weight(&self, name: &str, shape: &Shape) -> Result<Weight> {
        let stored = self.checkpoint.weight(name, shape, self.dtype)?;
        // short vectors are read in every forward: in memory they need no copy
        let stays = shape.rank() > 1 && matches!(self.device, Device::Cpu);
        if let Weight::Mapped(mapped) = &stored {
            let keeps = matches!(stored.dtype(), DType::BF16 | DType::F16) || stored.dtype() == self.dtype;
            if stays && keeps {
                return Ok(stored);
            }
            let dtype = if keeps { stored.dtype() } else { self.dtype };
            let tensor = stored.tensor()?.to_dtype(dtype)?.to_device(self.device)?;
            mapped.release();
            return Ok(Weight::Frozen(tensor));
        }
        Ok(Weight::Frozen(stored.tensor()?.to_device(self.device)?))
    }

    fn release(&self, name: &str) {
        self.checkpoint.release(name);
    }
}

/// Fresh weights.
pub(crate) struct FromSeed<'a> {
    pub(crate) seed: u64,
    pub(crate) std: f64,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
}

impl WeightSource for FromSeed<'_> {
    fn weight(&self, name: &str, shape: &Shape) -> Result<Weight> {
        let tensor = if name.ends_with(".bias") {
            Tensor::zeros(shape, self.dtype, self.device)?
        } else if shape.rank() == 1 {
            Tensor::ones(shape, self.dtype, self.device)?
        } else {
            self.normal(name, shape)?.to_device(self.device)?
        };
        Ok(Weight::Frozen(tensor))
    }

    fn release(&self, _: &str) {}
}

impl FromSeed<'_> {
    fn normal(&self, name: &str, shape: &Shape) -> Result<Tensor> {
        let words: Vec<u64> = name.bytes().map(u64::from).collect();
        let (seed, std) = (random::mix(self.seed, &words), self.std as f32);
        let value = move |i: usize| random::normal(seed, i as u64) * std;
        let n = shape.elem_count();
        Ok(match self.dtype {
            DType::BF16 => Tensor::from_vec(fill(n, |i| bf16::from_f32(value(i))), shape, &Device::Cpu)?,
            DType::F16 => Tensor::from_vec(fill(n, |i| f16::from_f32(value(i))), shape, &Device::Cpu)?,
            other => Tensor::from_vec(fill(n, value), shape, &Device::Cpu)?.to_dtype(other)?,
        })
    }
}

fn fill<T: Send>(n: usize, value: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    (0..n).into_par_iter().with_min_len(4096).map(value).collect()
}
