//! Where an operation computes: CPU kernels, GPU kernels, or the plain-candle reference.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap, hash_map::Entry},
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{DType, Device, Tensor, WithDType};
use pmetal_metal::Gpu;

use crate::Result;

/// Where an operation computes.
pub(crate) enum Place {
    /// Kernels on slices.
    Cpu,
    /// Kernels of a GPU.
    Gpu(Arc<dyn Gpu>),
    /// The reference, on whatever device the tensors are.
    Reference,
}

/// Operations whose kernels are not used; see [`switch_off`].
static OFF: RwLock<BTreeSet<String>> = RwLock::new(BTreeSet::new());

/// What was sent: by dtype and bytes.
type Kept = HashMap<(DType, Vec<u8>), Tensor>;

thread_local! {
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
    static EMULATOR: RefCell<Option<Arc<dyn Gpu>>> = const { RefCell::new(None) };
    static OFF_HERE: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// The place for operation `op` on `t`, which stands for all operands.
pub(crate) fn place(t: &Tensor, op: &'static str) -> Result<Place> {
    if !matches!(t.dtype(), DType::F32 | DType::BF16 | DType::F16) || is_off(op) {
        return Ok(Place::Reference);
    }
    Ok(match gpu_of(t.device())? {
        Some(gpu) => Place::Gpu(gpu),
        None => Place::Cpu,
    })
}

/// The GPU behind a device; none for the CPU.
pub(crate) fn gpu_of(device: &Device) -> Result<Option<Arc<dyn Gpu>>> {
    Ok(match device {
        Device::Cpu => EMULATOR.with_borrow(Clone::clone),
        Device::Cuda(cuda) => Some(pmetal_cuda::gpu(cuda)?),
        Device::Metal(metal) => Some(pmetal_metal::gpu(metal)?),
    })
}

/// Runs `f` with `gpu` in the place of the CPU on this thread: how the GPU's way through the operations runs in tests without a GPU.
pub fn emulate<T>(gpu: Arc<dyn Gpu>, f: impl FnOnce() -> T) -> T {
    struct Restore(Option<Arc<dyn Gpu>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            EMULATOR.set(self.0.take());
        }
    }
    let _restore = Restore(EMULATOR.replace(Some(gpu)));
    f()
}

/// Lets operations compute by their reference instead of their kernels, which failed on this machine.
pub fn switch_off(ops: impl IntoIterator<Item = String>) {
    OFF.write().unwrap_or_else(PoisonError::into_inner).extend(ops);
}

/// Runs `f` without the kernels of `op` on this thread.
pub(crate) fn without<T>(op: &'static str, f: impl FnOnce() -> T) -> T {
    struct Restore(Option<&'static str>);
    impl Drop for Restore {
        fn drop(&mut self) {
            OFF_HERE.set(self.0);
        }
    }
    let _restore = Restore(OFF_HERE.replace(Some(op)));
    f()
}

pub(crate) fn is_off(op: &str) -> bool {
    OFF_HERE.get() == Some(op) || OFF.read().unwrap_or_else(PoisonError::into_inner).contains(op)
}

/// Numbers of the host on a device.
pub(crate) fn upload<T: WithDType + bytemuck::Pod>(data: &[T], device: &Device) -> Result<Tensor> {
    let fresh = || Tensor::from_slice(data, data.len(), device);
    let key = || (T::DTYPE, bytemuck::cast_slice(data).to_vec());
    KEPT.with_borrow_mut(|kept| match kept {
        None => Ok(fresh()?),
        Some(kept) => Ok(match kept.entry(key()) {
            Entry::Occupied(sent) => sent.get().clone(),
            Entry::Vacant(place) => place.insert(fresh()?).clone(),
        }),
    })
}

/// Runs `f` with whatever it sends to one device kept there, so that sending the same again is sending nothing: what runs twice, the
/// second time to be captured into a CUDA graph, uploads in the first run alone.
pub fn uploads_kept<T>(f: impl FnOnce() -> T) -> T {
    struct Restore(Option<Kept>);
    impl Drop for Restore {
        fn drop(&mut self) {
            KEPT.set(self.0.take());
        }
    }
    let _restore = Restore(KEPT.replace(Some(Kept::new())));
    f()
}
