//! Where a decoder's weights come from.

use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};
use pmetal_ops::{Arena, Param, Weight, normal_on_gpu, random};
use rayon::prelude::*;

use crate::{Checkpoint, Result, names::stays_f32};

/// A source of weights by Hugging Face name.
pub(crate) trait WeightSource {
    /// The weight to compute with where it is not trained.
    fn frozen(&self, name: &str, shape: &Shape) -> Result<Weight>;

    /// Hands the weight over as exactly as it is known: the start of an f32 master.
    fn copy_to(&self, param: &Param) -> Result<()>;
}

/// The weight, trained where the arena has its name.
pub(crate) fn fetch(source: &dyn WeightSource, trainable: Option<&Arena>, name: &str, shape: &Shape) -> Result<Weight> {
    match trainable.and_then(|arena| arena.param(name)) {
        Some(param) => {
            source.copy_to(&param)?;
            Ok(Weight::Trainable(param))
        }
        None => source.frozen(name, shape),
    }
}

/// Weights of a model on disk.
pub(crate) struct FromCheckpoint<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
}

impl WeightSource for FromCheckpoint<'_> {
    fn frozen(&self, name: &str, shape: &Shape) -> Result<Weight> {
        let stored = self.checkpoint.weight(name, shape, self.dtype)?;
        // the CPU's products widen as they read, a GPU's take operands of one dtype
        let keeps = self.device.is_cpu() && matches!(stored.dtype(), DType::BF16 | DType::F16);
        // short vectors are read in every forward: in memory they need no copy
        if (keeps || stored.dtype() == self.dtype) && shape.rank() > 1 && self.device.is_cpu() {
            return Ok(stored);
        }
        let dtype = match keeps {
            _ if stays_f32(name) => DType::F32,
            true => stored.dtype(),
            false => self.dtype,
        };
        let tensor = pmetal_ops::device::send(&stored.tensor()?.to_dtype(dtype)?, self.device)?;
        self.checkpoint.release(name);
        Ok(Weight::Frozen(tensor))
    }

    fn copy_to(&self, param: &Param) -> Result<()> {
        let stored = self.checkpoint.weight(param.name(), param.value().shape(), DType::F32)?;
        param.set(&stored.tensor()?)?;
        self.checkpoint.release(param.name());
        Ok(())
    }
}

/// Fresh weights.
pub(crate) struct FromSeed<'a> {
    pub(crate) seed: u64,
    pub(crate) std: f64,
    /// What a norm's weights start as.
    pub(crate) norm: f32,
    pub(crate) dtype: DType,
    pub(crate) device: &'a Device,
}

impl WeightSource for FromSeed<'_> {
    fn frozen(&self, name: &str, shape: &Shape) -> Result<Weight> {
        if self.constant(name).is_none()
            && let Some(made) = normal_on_gpu(shape, self.stream(name), self.std as f32, self.dtype, self.device)?
        {
            return Ok(Weight::Frozen(made));
        }
        let dtype = if stays_f32(name) { DType::F32 } else { self.dtype };
        Ok(Weight::Frozen(pmetal_ops::device::send(&self.fresh(name, shape, dtype)?, self.device)?))
    }

    fn copy_to(&self, param: &Param) -> Result<()> {
        Ok(param.set(&self.fresh(param.name(), param.value().shape(), DType::F32)?)?)
    }
}

impl FromSeed<'_> {
    /// The seed of a tensor's numbers.
    fn stream(&self, name: &str) -> u64 {
        random::mix(self.seed, &name.bytes().map(u64::from).collect::<Vec<_>>())
    }

    /// The number that all of a bias's or a norm's start as.
    fn constant(&self, name: &str) -> Option<f32> {
        if name.ends_with("bias") {
            return Some(0.0);
        }
        name.contains("norm").then_some(self.norm)
    }

    fn fresh(&self, name: &str, shape: &Shape, dtype: DType) -> Result<Tensor> {
        match self.constant(name) {
            Some(constant) => Ok(Tensor::full(constant, shape, &Device::Cpu)?.to_dtype(dtype)?),
            None => self.normal(name, shape, dtype),
        }
    }

    fn normal(&self, name: &str, shape: &Shape, dtype: DType) -> Result<Tensor> {
        let (seed, std) = (self.stream(name), self.std as f32);
        let value = move |i: usize| random::normal(seed, i as u64) * std;
        let n = shape.elem_count();
        Ok(match dtype {
            DType::BF16 => Tensor::from_vec(fill(n, |i| bf16::from_f32(value(i))), shape, &Device::Cpu)?,
            DType::F16 => Tensor::from_vec(fill(n, |i| f16::from_f32(value(i))), shape, &Device::Cpu)?,
            other => Tensor::from_vec(fill(n, value), shape, &Device::Cpu)?.to_dtype(other)?,
        })
    }
}

fn fill<T: Send>(n: usize, value: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    (0..n).into_par_iter().with_min_len(4096).map(value).collect()
}
