//! Which part of a head turns, and by which angles.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result, place::upload};

/// Which part of each head turns: as many pairs of columns as there are frequencies, from `start` on. The other columns pass through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeLayout {
    /// Columns of a head.
    pub head_dim: usize,
    /// The first column that turns.
    pub start: usize,
    /// Whether pairs are neighbours, and not a column of the first half of those that turn with one of the second.
    pub interleaved: bool,
}

impl RopeLayout {
    /// All of a head turns, its first half with its second.
    pub const fn whole(head_dim: usize) -> Self {
        Self { head_dim, start: 0, interleaved: false }
    }
}

/// Cosines and sines by position: a model's, computed as far as its passes asked for them, and kept.
#[derive(Debug)]
pub struct RopeAngles {
    inv_freq: Vec<f32>,
    factor: f32,
    layout: RopeLayout,
    known: Mutex<Arc<Known>>,
}

#[derive(Debug, Default)]
pub(super) struct Known {
    /// `[2, positions, half]`: cosines, sines.
    data: Vec<f32>,
    pub(super) positions: usize,
    /// Pairs that turn.
    pub(super) half: usize,
    /// The same on the device that first asked.
    on_device: OnceLock<Tensor>,
}

impl RopeAngles {
    /// Angles with one frequency per pair and a factor on cosine and sine (1 for plain rope). What does not fit `layout` is refused where it
    /// shall turn.
    pub fn new(inv_freq: &[f32], factor: f32, layout: RopeLayout) -> Self {
        Self { inv_freq: inv_freq.to_vec(), factor, layout, known: Mutex::default() }
    }

    /// The table of tokens at `positions`.
    pub fn of(&self, positions: &[u32]) -> RopeTable {
        let needed = positions.iter().max().map_or(1, |&last| last as usize + 1);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.positions < needed {
            *known = Arc::new(self.computed(needed.next_power_of_two()));
        }
        RopeTable::of_known(known.clone(), positions.to_vec(), self.layout)
    }

    fn computed(&self, positions: usize) -> Known {
        let half = self.inv_freq.len();
        let mut data = vec![0f32; 2 * positions * half];
        let (cosines, sines) = data.split_at_mut(positions * half);
        for (i, (cos, sin)) in cosines.iter_mut().zip(sines).enumerate() {
            let angle = (i / half) as f32 * self.inv_freq[i % half];
            (*cos, *sin) = (angle.cos() * self.factor, angle.sin() * self.factor);
        }
        Known { data, positions, half, on_device: OnceLock::new() }
    }
}

/// Cosines and sines of every token of a batch, `[tokens, pairs]` f32, and which part of heads they turn.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Turns>);

#[derive(Debug)]
struct Turns {
    known: Arc<Known>,
    positions: Vec<u32>,
    layout: RopeLayout,
    /// The positions on the device that first asked.
    sent: OnceLock<Tensor>,
    /// `[2, tokens, half]`, for a CPU.
    gathered: OnceLock<Vec<f32>>,
}

impl RopeTable {
    /// The table for tokens at `positions`, of angles as in [`RopeAngles::new`].
    pub fn new(positions: &[u32], inv_freq: &[f32], factor: f32, layout: RopeLayout) -> Self {
        RopeAngles::new(inv_freq, factor, layout).of(positions)
    }

    fn of_known(known: Arc<Known>, positions: Vec<u32>, layout: RopeLayout) -> Self {
        Self(Arc::new(Turns { known, positions, layout, sent: OnceLock::new(), gathered: OnceLock::new() }))
    }

    /// The tokens of several tables behind one another: rows whose frequencies differ. Tables of different layouts, or of different numbers
    /// of frequencies, make one of no tokens, which fits no operand.
    pub fn joined(tables: &[Self]) -> Self {
        let Some((first, rest)) = tables.split_first() else {
            return Self::of_known(Arc::default(), vec![], RopeLayout::whole(0));
        };
        let (layout, half) = (first.0.layout, first.0.known.half);
        if rest.iter().any(|table| table.0.layout != layout || table.0.known.half != half) {
            return Self::of_known(Arc::default(), vec![], layout);
        }
        if rest.iter().all(|table| Arc::ptr_eq(&table.0.known, &first.0.known)) {
            let positions = tables.iter().flat_map(|table| &table.0.positions).copied().collect();
            return Self::of_known(first.0.known.clone(), positions, layout);
        }
        let (cosines, sines): (Vec<_>, Vec<_>) = tables.iter().map(Self::cos_and_sin).unzip();
        let data = [cosines.concat(), sines.concat()].concat();
        let positions = tables.iter().map(|table| table.0.positions.len()).sum();
        let known = Known { data, positions, half, on_device: OnceLock::new() };
        Self::of_known(Arc::new(known), (0..positions as u32).collect(), layout)
    }

    /// Columns of the heads that it turns.
    pub(crate) fn head_dim(&self) -> usize {
        self.0.layout.head_dim
    }

    pub(crate) fn layout(&self) -> RopeLayout {
        self.0.layout
    }

    /// Whether all of a head turns, its first half with its second.
    pub(crate) fn is_whole(&self) -> bool {
        self.0.layout == RopeLayout::whole(2 * self.0.known.half)
    }

    pub(super) fn known(&self) -> &Known {
        &self.0.known
    }

    pub(super) fn tokens(&self) -> usize {
        self.0.positions.len()
    }

    /// Heads of a token of `x [tokens, heads * head_dim]`.
    pub(crate) fn heads(&self, op: &'static str, x: &Tensor) -> Result<usize> {
        let ((tokens, width), RopeLayout { head_dim, start, .. }) = (x.dims2()?, self.0.layout);
        let turning = 2 * self.0.known.half;
        if turning == 0 || start + turning > head_dim {
            return Err(Error::operand(op, "columns that turn", format_args!("some of {head_dim}"), [start, turning]));
        }
        if !width.is_multiple_of(head_dim) || self.tokens() != tokens {
            return Err(Error::operand(op, "table", [tokens, width], [self.tokens(), head_dim]));
        }
        Ok(width / head_dim)
    }

    pub(crate) fn cos_and_sin(&self) -> (&[f32], &[f32]) {
        let Known { data, positions, half, .. } = &*self.0.known;
        let both = self.0.gathered.get_or_init(|| {
            let parts = data.chunks((positions * half).max(1)).flat_map(|part| {
                self.0.positions.iter().flat_map(move |&p| &part[p as usize * half..(p as usize + 1) * half])
            });
            parts.copied().collect()
        });
        both.split_at(both.len() / 2)
    }

    /// `[tokens, 1, pairs]`: cosines, sines.
    pub(super) fn tensors(&self, dtype: DType, device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
        let (cos, sin) = self.cos_and_sin();
        let shape = (self.tokens(), 1, self.0.known.half);
        let read = |data: &[f32]| Tensor::from_slice(data, shape, device)?.to_dtype(dtype);
        Ok((read(cos)?, read(sin)?))
    }

    /// Angles by position and the positions, on a device.
    pub(crate) fn on(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let angles = sent(&self.0.known.on_device, device, || upload(&self.0.known.data, device))?;
        Ok((angles, sent(&self.0.sent, device, || upload(&self.0.positions, device))?))
    }
}

/// What is held for the device that first asked; for another it is sent again.
fn sent(held: &OnceLock<Tensor>, device: &Device, send: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    if let Some(tensor) = held.get().filter(|t| t.device().same_device(device)) {
        return Ok(tensor.clone());
    }
    let tensor = send()?;
    Ok(if held.get().is_none() { held.get_or_init(|| tensor).clone() } else { tensor })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INV_FREQ: [f32; 2] = [1.0, 0.1];

    #[test]
    fn angles_that_grew_are_the_same() {
        let (angles, positions) = (RopeAngles::new(&INV_FREQ, 1.0, RopeLayout::whole(4)), [0, 3, 1]);
        let first = angles.of(&positions);
        let later = angles.of(&[100]);
        let again = angles.of(&positions);
        assert_eq!(first.cos_and_sin(), again.cos_and_sin());
        assert_eq!(later.cos_and_sin(), RopeTable::new(&[100], &INV_FREQ, 1.0, RopeLayout::whole(4)).cos_and_sin());
    }

    /// Of one set of angles and of two.
    #[test]
    fn joined_tables_are_their_tokens_behind_one_another() {
        let layout = RopeLayout { head_dim: 7, start: 2, interleaved: true };
        let angles = RopeAngles::new(&INV_FREQ, 1.0, layout);
        let others = RopeAngles::new(&[0.7, 0.2], 1.5, layout);
        for second in [angles.of(&[5, 6]), others.of(&[5, 6])] {
            let first = angles.of(&[0, 1, 7]);
            let joined = RopeTable::joined(&[first.clone(), second.clone()]);
            let (cos, sin) = joined.cos_and_sin();
            assert_eq!(cos, [first.cos_and_sin().0, second.cos_and_sin().0].concat());
            assert_eq!(sin, [first.cos_and_sin().1, second.cos_and_sin().1].concat());
            assert_eq!((joined.tokens(), joined.layout()), (5, layout));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = |shape: [usize; 2]| crate::testing::random(&shape, 1);
        let whole = |half: usize| RopeTable::new(&[0, 1], &vec![1.0; half], 1.0, RopeLayout::whole(2 * half));
        assert_eq!(whole(2).heads("rope", &x([2, 8])).unwrap(), 2);
        for shape in [[3, 4], [2, 6]] {
            assert!(whole(2).heads("rope", &x(shape)).is_err());
        }
        assert!(whole(0).heads("rope", &x([2, 4])).is_err());
        let beyond = RopeLayout { head_dim: 4, start: 1, interleaved: false };
        assert!(RopeTable::new(&[0, 1], &INV_FREQ, 1.0, beyond).heads("rope", &x([2, 4])).is_err());
        for tables in [vec![], vec![whole(2), whole(1)]] {
            assert!(RopeTable::joined(&tables).heads("rope", &x([4, 4])).is_err());
        }
    }
}
