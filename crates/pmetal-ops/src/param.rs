//! Trainable parameters as ranges of flat arenas.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use candle_core::{DType, Device, Shape, Tensor};
use pmetal_metal::exact_zeros;

use crate::{
    Error, Result, elementwise,
    kernel::{View, with_slice_mut},
    linear::Placements,
};

/// Rows of [`Arena::state`]: the value and AdamW's two moments.
const STATES: usize = 3;

/// All trainable parameters of a run, side by side.
///
/// Values, optimizer states (f32) and gradients (f32) are flat tensors, so that clipping and the optimizer are one pass and a
/// data-parallel bucket is a range. Where the model computes with a parameter in another dtype (full fine-tuning in bf16), a copy of
/// its value in that dtype is what the model reads, and the f32 value is the master.
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

struct Inner {
    /// `[3, n]` f32: values, first moments, second moments.
    state: Tensor,
    /// `[n]` f32.
    grad: Tensor,
    /// `[n]`: the copies of all values, where the model computes with all of them in one other dtype.
    copies: Option<Tensor>,
    slots: Vec<Slot>,
    by_name: HashMap<String, usize>,
    /// How often values have changed.
    version: AtomicU64,
    /// Where else values lie.
    placements: Mutex<Placements>,
}

struct Slot {
    name: String,
    /// The master, or its copy where the model computes in another dtype.
    value: Tensor,
    master: Tensor,
    grad: Tensor,
    /// Whether this step has written the gradient; until then what lies there is of the step before.
    written: AtomicBool,
}

impl Slot {
    fn is_copied(&self) -> bool {
        self.value.dtype() != DType::F32
    }
}

impl Arena {
    /// Room for parameters of the given names and shapes, all zero. `dtype` is what the model computes with them in.
    pub fn new(params: &[(String, Shape)], dtype: DType, device: &Device) -> Result<Self> {
        let params: Vec<_> = params.iter().map(|(name, shape)| (name.clone(), shape.clone(), dtype)).collect();
        Self::mixed(&params, device)
    }

    /// Room for parameters, all zero, each with the dtype that the model computes with it in.
    pub fn mixed(params: &[(String, Shape, DType)], device: &Device) -> Result<Self> {
        let n = params.iter().map(|(_, shape, _)| shape.elem_count()).sum();
        let state = exact_zeros((STATES, n), DType::F32, device)?;
        let grad = exact_zeros(n, DType::F32, device)?;
        let values = state.get(0)?;
        let copies = match params.first() {
            Some((_, _, first)) if *first != DType::F32 && params.iter().all(|(_, _, dtype)| dtype == first) => {
                Some(exact_zeros(n, *first, device)?)
            }
            _ => None,
        };
        let mut slots = Vec::with_capacity(params.len());
        let mut by_name = HashMap::with_capacity(params.len());
        let mut offset = 0;
        for (name, shape, dtype) in params {
            let len = shape.elem_count();
            let part = |flat: &Tensor| flat.narrow(0, offset, len)?.reshape(shape.clone());
            let master = part(&values)?;
            let value = match &copies {
                Some(copies) => part(copies)?,
                None if *dtype == DType::F32 => master.clone(),
                None => Tensor::zeros(shape, *dtype, device)?,
            };
            let written = AtomicBool::new(false);
            slots.push(Slot { name: name.clone(), value, master, grad: part(&grad)?, written });
            by_name.insert(name.clone(), slots.len() - 1);
            offset += len;
        }
        Ok(Self(Arc::new(Inner {
            state,
            grad,
            copies,
            slots,
            by_name,
            version: AtomicU64::new(0),
            placements: Mutex::default(),
        })))
    }

    /// The parameter called `name`.
    pub fn param(&self, name: &str) -> Option<Param> {
        self.0.by_name.get(name).map(|&slot| Param { arena: self.clone(), slot })
    }

    /// Every parameter, in the order of the arena.
    pub fn params(&self) -> impl Iterator<Item = Param> + '_ {
        (0..self.0.slots.len()).map(|slot| Param { arena: self.clone(), slot })
    }

    /// Number of trainable values.
    pub fn len(&self) -> usize {
        self.0.grad.elem_count()
    }

    /// Whether there is nothing to train.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The gradients of this step, `[n]` f32: zero where no operation wrote one.
    pub fn grads(&self) -> Result<&Tensor> {
        for slot in &self.0.slots {
            if !slot.written.swap(true, Ordering::Relaxed) {
                slot.grad.zero_set()?;
            }
        }
        Ok(&self.0.grad)
    }

    /// Forgets the gradients: the next one written replaces them.
    pub fn clear_grads(&self) {
        for slot in &self.0.slots {
            slot.written.store(false, Ordering::Relaxed);
        }
    }

    /// The gradients of `len` values from `first` on, flat, as they lie there.
    pub(crate) fn grads_at(&self, first: usize, len: usize) -> Result<Tensor> {
        Ok(self.0.grad.narrow(0, first, len)?)
    }

    /// Values and optimizer states, `[3, n]` f32.
    pub(crate) fn state(&self) -> &Tensor {
        &self.0.state
    }

    /// Changes whenever a value does.
    pub(crate) fn version(&self) -> u64 {
        self.0.version.load(Ordering::Relaxed)
    }

    /// Tells that values have changed.
    pub(crate) fn touch(&self) {
        self.0.version.fetch_add(1, Ordering::Relaxed);
    }

    /// The matrices that hold copies of the values.
    pub(crate) fn placements(&self) -> MutexGuard<'_, Placements> {
        self.0.placements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both are the same memory.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The copies of all values, `[n]`, where the model computes with all of them in one other dtype than f32.
    pub(crate) fn copies(&self) -> Option<&Tensor> {
        self.0.copies.as_ref()
    }

    /// Rounds the masters into the copies the model reads, after an update.
    pub(crate) fn refresh_copies(&self) -> Result<()> {
        if let Some(copies) = &self.0.copies {
            return elementwise::convert_into(&self.0.state.get(0)?, copies);
        }
        self.0
            .slots
            .iter()
            .filter(|slot| slot.is_copied())
            .try_for_each(|slot| elementwise::convert_into(&slot.master, &slot.value))
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Arena({} values)", self.len())
    }
}

/// A trainable leaf with a dotted name. Clones are the same parameter.
#[derive(Clone)]
pub struct Param {
    arena: Arena,
    slot: usize,
}

impl Param {
    fn get(&self) -> &Slot {
        &self.arena.0.slots[self.slot]
    }

    /// The arena it is in.
    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Where in the arena it begins.
    pub(crate) fn first(&self) -> usize {
        self.get().master.layout().start_offset()
    }

    /// The dotted name.
    pub fn name(&self) -> &str {
        &self.get().name
    }

    /// The value in the dtype the model computes in.
    pub fn value(&self) -> &Tensor {
        &self.get().value
    }

    /// The f32 value the optimizer updates.
    pub fn master(&self) -> &Tensor {
        &self.get().master
    }

    /// The gradient of this step (f32), zero where none arrived.
    pub fn grad(&self) -> Result<Tensor> {
        let slot = self.get();
        if slot.written.load(Ordering::Relaxed) { Ok(slot.grad.clone()) } else { Ok(slot.grad.zeros_like()?) }
    }

    /// Replaces the value. `tensor` has this parameter's shape and any float dtype.
    pub fn set(&self, tensor: &Tensor) -> Result<()> {
        let slot = self.get();
        if tensor.shape() != slot.master.shape() {
            return Err(Error::operand("set", slot.name.clone(), slot.master.dims(), tensor.dims()));
        }
        let tensor = tensor.to_device(slot.master.device())?.contiguous()?;
        elementwise::convert_into(&tensor, &slot.master)?;
        self.arena.touch();
        if slot.is_copied() {
            elementwise::convert_into(&tensor, &slot.value)?;
        }
        Ok(())
    }

    /// Adds to the gradient; the first one of a step replaces what was there.
    pub(crate) fn add_grad(&self, grad: &Tensor) -> Result<()> {
        let slot = self.get();
        if grad.shape() != slot.grad.shape() {
            return Err(Error::operand("gradient", slot.name.clone(), slot.grad.dims(), grad.dims()));
        }
        let grad = grad.contiguous()?;
        if slot.written.swap(true, Ordering::Relaxed) {
            elementwise::add_assign(&slot.grad, &grad)
        } else {
            elementwise::convert_into(&grad, &slot.grad)
        }
    }

    /// Hands the gradient (f32, row-major) to a kernel that accumulates into it; it starts as zeros.
    pub(crate) fn accumulate_grad<R>(&self, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        let slot = self.get();
        let fresh = !slot.written.swap(true, Ordering::Relaxed);
        with_slice_mut::<f32, _>(&slot.grad, "accumulate_grad", |g| {
            if fresh {
                g.fill(0.0);
            }
            f(g)
        })
    }

    /// The gradient (f32) for a kernel that writes it where it lies, and whether this is the first of the step: what the tensor holds then is
    /// of the step before.
    pub(crate) fn grad_target(&self) -> (&Tensor, bool) {
        let slot = self.get();
        (&slot.grad, !slot.written.swap(true, Ordering::Relaxed))
    }

    /// The gradient (f32) for a kernel that adds to it; it starts as zeros.
    pub(crate) fn grad_sum(&self) -> Result<&Tensor> {
        let (grad, fresh) = self.grad_target();
        if fresh {
            grad.zero_set()?;
        }
        Ok(grad)
    }

    /// The value as a slice, on the CPU.
    pub(crate) fn view(&self) -> Result<View<'_>> {
        View::of_tensor(self.value(), "param")
    }
}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Param({} {:?})", self.name(), self.value().dims())
    }
}
