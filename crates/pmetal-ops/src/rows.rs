//! Rows with room for more: on a GPU `[rows, width]` may be a column range of a wider tensor.
//!
//! A product of several matrices side by side reads one row after the other, so whoever makes a row leaves columns free behind it, and whoever
//! makes a gradient writes it where the product backward will read it. Such a tensor is *pitched*: its strides are `[pitch, 1]`.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use candle_core::{DType, Device, Tensor};
use pmetal_metal::empty;

use crate::{Result, autograd::Value};

/// Rows that nothing has been written to.
#[derive(Clone, Debug)]
pub(crate) struct SpareRows {
    /// `[rows, width]`, pitched.
    pub(crate) rows: Tensor,
    /// `[rows, width + spare]`, contiguous: the same memory.
    pub(crate) parent: Tensor,
}

/// Rows of `width` columns with `spare` free ones behind each.
pub(crate) fn empty_rows(rows: usize, width: usize, spare: usize, dtype: DType, device: &Device) -> Result<SpareRows> {
    let parent = empty((rows, width + spare), dtype, device)?;
    Ok(SpareRows { rows: parent.narrow(1, 0, width)?, parent })
}

impl SpareRows {
    /// Tells `value`, whose tensor these rows are, of the free columns.
    pub(crate) fn attach(self, value: Value) -> Value {
        value.with_spare(self.parent)
    }
}

/// Where the gradients of a group of values come to lie side by side: `[rows, pitch]`, made when the first is asked for.
#[derive(Debug)]
pub(crate) struct GradRows {
    rows: usize,
    pitch: usize,
    parent: Mutex<Option<Tensor>>,
}

impl GradRows {
    pub(crate) fn new(rows: usize, pitch: usize) -> Arc<Self> {
        Arc::new(Self { rows, pitch, parent: Mutex::default() })
    }

    /// All of it, `[rows, pitch]`.
    pub(crate) fn parent(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parent) = &*parent {
            return Ok(parent.clone());
        }
        Ok(parent.insert(empty((self.rows, self.pitch), dtype, device)?).clone())
    }

    /// The place of columns `first ..` of it.
    pub(crate) fn place(self: &Arc<Self>, first: usize) -> GradPlace {
        GradPlace(Some(Arc::new(Place { shared: self.clone(), first, taken: AtomicBool::new(false) })))
    }
}

/// Where the gradient of a value shall be written.
#[derive(Clone, Debug, Default)]
pub(crate) struct GradPlace(Option<Arc<Place>>);

#[derive(Debug)]
struct Place {
    shared: Arc<GradRows>,
    first: usize,
    /// A second gradient must not overwrite the first.
    taken: AtomicBool,
}

impl GradPlace {
    /// A tensor `[rows, width]` for the gradient, which nothing has been written to: pitched where somebody waits for it, else contiguous.
    pub(crate) fn empty(&self, (rows, width): (usize, usize), dtype: DType, device: &Device) -> Result<Tensor> {
        if let Some(place) = &self.0
            && rows == place.shared.rows
            && place.first + width <= place.shared.pitch
            && !place.taken.swap(true, Ordering::Relaxed)
        {
            return Ok(place.shared.parent(dtype, device)?.narrow(1, place.first, width)?);
        }
        Ok(empty((rows, width), dtype, device)?)
    }

    /// The place of a gradient `[rows, width]`, as columns from the second number on, for its parts: it is theirs from now on.
    pub(crate) fn divided(&self, (rows, width): (usize, usize)) -> Option<(Arc<GradRows>, usize)> {
        let place = self.0.as_ref()?;
        let fits = rows == place.shared.rows && place.first + width <= place.shared.pitch;
        (fits && !place.taken.swap(true, Ordering::Relaxed)).then(|| (place.shared.clone(), place.first))
    }
}

/// Whether both tensors are the same elements of the same memory.
pub(crate) fn same_memory(a: &Tensor, b: &Tensor) -> bool {
    let ((a_storage, a_layout), (b_storage, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    std::ptr::eq(&*a_storage, &*b_storage)
        && a_layout.start_offset() == b_layout.start_offset()
        && a_layout.dims() == b_layout.dims()
        && a_layout.stride() == b_layout.stride()
}
