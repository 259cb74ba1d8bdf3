use candle_core::{DType, Device, Tensor};
use pmetal_ops::write_rows;

use crate::{DecoderSpec, Error, Result};

/// Keys (behind rope) and values of the tokens that were read, for several rows with room for `capacity` tokens each.
#[derive(Debug)]
pub struct KvCache {
    /// `[rows * capacity, width]` for each layer: what its attention keeps of a token, as a rule keys and values.
    layers: Vec<Vec<Tensor>>,
    /// The tokens of each row.
    ids: Vec<Vec<u32>>,
    lens: Vec<usize>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache; `dtype` is the model's.
    pub fn new(spec: &DecoderSpec, rows: usize, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let room = |width| Ok(Tensor::zeros((rows * capacity, width), dtype, device)?);
        let layers = spec.layers.iter().map(|layer| layer.attention.kept_widths().into_iter().map(room).collect());
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { layers, ids: vec![Vec::new(); rows], lens: vec![0; rows], capacity })
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
        if let (Some(held), Some(ids)) = (self.lens.get_mut(row), self.ids.get_mut(row)) {
            *held = len.min(*held);
            ids.truncate(len);
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
        let layers = self.layers.iter().map(|kept| kept.iter().map(moved).collect()).collect::<Result<_>>()?;
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

    /// Writes what a layer keeps of the new tokens, `[tokens, width]` each, behind what it holds, and returns all of its places. The lengths
    /// stay until [`KvCache::advance`].
    pub(crate) fn extend(&self, layer: usize, new: &[&Tensor], q_lens: &[usize]) -> Result<Vec<Tensor>> {
        let places = self.layer(layer)?;
        let starts = self.lens.iter().enumerate().map(|(row, held)| row * self.capacity + held);
        let runs: Vec<(usize, usize)> = starts.zip(q_lens.iter().copied()).collect();
        new.iter().zip(places).try_for_each(|(new, places)| write_rows(new, places, &runs))?;
        Ok(places.to_vec())
    }

    /// A layer's places.
    pub(crate) fn layer(&self, layer: usize) -> Result<&[Tensor]> {
        let found = self.layers.get(layer).map(Vec::as_slice);
        let layers = self.layers.len();
        found.ok_or_else(|| Error::Input { reason: format!("the cache has {layers} layers, not {}", layer + 1) })
    }

    /// Counts the tokens that every layer has written: `q_lens` of `ids` for each row.
    pub(crate) fn advance(&mut self, ids: &[u32], q_lens: &[usize]) {
        let mut rest = ids;
        for ((held, len), &more) in self.ids.iter_mut().zip(&mut self.lens).zip(q_lens) {
            let (new, behind) = rest.split_at(more.min(rest.len()));
            held.extend_from_slice(new);
            *len += more;
            rest = behind;
        }
    }

    /// The tokens of a row.
    pub(crate) fn ids(&self, row: usize) -> &[u32] {
        self.ids.get(row).map_or(&[], Vec::as_slice)
    }
}

/// A tensor's dimensions with another number of rows.
fn with_rows(tensor: &Tensor, rows: usize) -> Vec<usize> {
    std::iter::once(rows).chain(tensor.dims().iter().skip(1).copied()).collect()
}
