use candle_core::{DType, Device, Tensor};
use pmetal_ops::write_rows;

use crate::{DecoderSpec, Error, Result};

/// Keys (behind rope) and values of the tokens that were read, for several rows with room for `capacity` tokens each.
#[derive(Debug)]
pub struct KvCache {
    /// `[rows * capacity, kv_heads * head_dim]` for each layer: keys, values.
    layers: Vec<(Tensor, Tensor)>,
    lens: Vec<usize>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache; `dtype` is the model's.
    pub fn new(spec: &DecoderSpec, rows: usize, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let shape = (rows * capacity, spec.num_key_value_heads * spec.head_dim);
        let room = || Tensor::zeros(shape, dtype, device);
        let layers = (0..spec.num_hidden_layers).map(|_| Ok((room()?, room()?))).collect::<Result<_>>()?;
        Ok(Self { layers, lens: vec![0; rows], capacity })
    }

    /// Tokens held of each row.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Places per row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets what a row holds beyond its first `len` tokens.
    pub fn truncate(&mut self, row: usize, len: usize) {
        if let Some(held) = self.lens.get_mut(row) {
            *held = len.min(*held);
        }
    }

    /// Makes room for `capacity` tokens per row; what is held stays.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let held: Vec<(usize, usize)> = self.lens.iter().enumerate().map(|(row, &len)| (row * capacity, len)).collect();
        let moved = |old: &Tensor| {
            let new = Tensor::zeros(with_rows(old, held.len() * capacity), old.dtype(), old.device())?;
            let rows = self.lens.iter().enumerate().map(|(row, &len)| old.narrow(0, row * self.capacity, len));
            write_rows(&Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?, &new, &held)?;
            Ok::<_, Error>(new)
        };
        let layers = self.layers.iter().map(|(k, v)| Ok((moved(k)?, moved(v)?))).collect::<Result<_>>()?;
        (self.layers, self.capacity) = (layers, capacity);
        Ok(())
    }

    /// The rows' lengths once `q_lens` more tokens are in.
    pub(crate) fn lens_with(&self, q_lens: &[usize]) -> Result<Vec<usize>> {
        if q_lens.len() != self.lens.len() {
            let reason = format!("{} rows for a cache of {}", q_lens.len(), self.lens.len());
            return Err(Error::Input { reason });
        }
        let lens: Vec<usize> = self.lens.iter().zip(q_lens).map(|(held, more)| held + more).collect();
        match lens.iter().position(|&len| len > self.capacity) {
            Some(row) => Err(Error::CacheFull { row, needed: lens[row], capacity: self.capacity }),
            None => Ok(lens),
        }
    }

    /// Writes a layer's keys and values of the new tokens, `[tokens, kv_heads * head_dim]`, behind those held, and returns all of
    /// the layer's places. The lengths stay until [`KvCache::advance`].
    pub(crate) fn extend(&self, layer: usize, k: &Tensor, v: &Tensor, q_lens: &[usize]) -> Result<(Tensor, Tensor)> {
        let Some((keys, values)) = self.layers.get(layer) else {
            return Err(Error::Input {
                reason: format!("the cache has {} layers, not {}", self.layers.len(), layer + 1),
            });
        };
        let starts = self.lens.iter().enumerate().map(|(row, held)| row * self.capacity + held);
        let runs: Vec<(usize, usize)> = starts.zip(q_lens.iter().copied()).collect();
        write_rows(k, keys, &runs)?;
        write_rows(v, values, &runs)?;
        Ok((keys.clone(), values.clone()))
    }

    /// A layer's places, keys and values.
    pub(crate) fn layers(&self) -> &[(Tensor, Tensor)] {
        &self.layers
    }

    /// Counts the tokens that every layer has written.
    pub(crate) fn advance(&mut self, lens: Vec<usize>) {
        self.lens = lens;
    }
}

/// A tensor's dimensions with another number of rows.
fn with_rows(tensor: &Tensor, rows: usize) -> Vec<usize> {
    std::iter::once(rows).chain(tensor.dims().iter().skip(1).copied()).collect()
}
