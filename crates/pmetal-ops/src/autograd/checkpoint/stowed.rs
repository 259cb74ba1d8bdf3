use std::collections::VecDeque;

use candle_core::Tensor;
use pmetal_metal::Resting;

use super::Fate;
use crate::{Error, Result, place::gpu_of};

/// What survives the first run of a checkpointed function.
#[derive(Default)]
pub(super) struct Stowed {
    inputs: Vec<Item>,
    /// In the order in which they were computed: the operation, its results.
    results: VecDeque<(String, Vec<Item>)>,
}

/// A tensor that is on the device, or rests in the host's memory.
enum Item {
    Here(Tensor),
    Away(Box<dyn Resting>),
}

impl Item {
    fn new(tensor: &Tensor, fate: Fate) -> Result<Self> {
        if fate == Fate::Host
            && let Some(gpu) = gpu_of(tensor.device())?
            && let Some(resting) = gpu.rest(tensor)?
        {
            return Ok(Self::Away(resting));
        }
        Ok(Self::Here(tensor.clone()))
    }

    fn take(self) -> Result<Tensor> {
        match self {
            Self::Here(tensor) => Ok(tensor),
            Self::Away(resting) => Ok(resting.take()?),
        }
    }
}

impl Stowed {
    pub(super) fn of_inputs(inputs: &[Tensor], fate: Fate) -> Result<Self> {
        let inputs = inputs.iter().map(|tensor| Item::new(tensor, fate)).collect::<Result<_>>()?;
        Ok(Self { inputs, results: VecDeque::new() })
    }

    pub(super) fn put(&mut self, op: &str, results: &[Tensor], fate: Fate) -> Result<()> {
        let items = results.iter().map(|tensor| Item::new(tensor, fate)).collect::<Result<_>>()?;
        self.results.push_back((op.to_owned(), items));
        Ok(())
    }

    pub(super) fn take_inputs(&mut self) -> Result<Vec<Tensor>> {
        self.inputs.drain(..).map(Item::take).collect()
    }

    /// The results of the next operation that left some, which must be `op`.
    pub(super) fn take(&mut self, op: &str) -> Result<Vec<Tensor>> {
        match self.results.pop_front() {
            Some((first, items)) if first == op => items.into_iter().map(Item::take).collect(),
            other => {
                let found = other.map_or_else(|| "nothing".into(), |(first, _)| first);
                let reason = format!("the second run asks for results of {op}, the first one left those of {found}");
                Err(Error::Lengths { op: "checkpoint", reason })
            }
        }
    }

    /// Gives the device the memory of what rests elsewhere.
    pub(super) fn leave(&mut self) -> Result<()> {
        self.away().try_for_each(|resting| Ok(resting.leave()?))
    }

    /// Starts to bring back what rests elsewhere.
    pub(super) fn recall(&mut self) -> Result<()> {
        self.away().try_for_each(|resting| Ok(resting.recall()?))
    }

    fn away(&mut self) -> impl Iterator<Item = &mut Box<dyn Resting>> {
        let results = self.results.iter_mut().flat_map(|(_, items)| items);
        self.inputs.iter_mut().chain(results).filter_map(|item| match item {
            Item::Here(_) => None,
            Item::Away(resting) => Some(resting),
        })
    }
}
