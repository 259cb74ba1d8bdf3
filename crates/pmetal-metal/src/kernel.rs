//! Kernels as their texts declare them, and calls of them.

use std::{cell::RefCell, collections::BTreeSet};

use candle_core::{DType, Tensor};

use crate::{Error, Gpu, Result};

/// What a kernel does with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads it.
    Read,
    /// Writes every element of it, and reads none.
    Write,
    /// Changes it where it lies, or writes only parts of it.
    Update,
}

/// What a buffer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// The dtype that the kernel is compiled for.
    T,
    /// f32.
    F32,
    /// u32.
    U32,
    /// u8.
    U8,
}

impl Element {
    /// The dtype, in a kernel compiled for `t`.
    pub fn dtype(self, t: DType) -> DType {
        match self {
            Self::T => t,
            Self::F32 => DType::F32,
            Self::U32 => DType::U32,
            Self::U8 => DType::U8,
        }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Its name.
    pub name: &'static str,
    /// What the kernel does with it.
    pub access: Access,
    /// What it is made of.
    pub element: Element,
    /// Whether it may be a matrix of rows with a pitch, which the kernel learns from its parameters.
    pub rows: bool,
}

/// Elements from the beginning of one row of a matrix to the next's, where each row lies in one piece and they do not overlap: the width
/// of a contiguous one, that of the whole where it is a column range of one. None of any other tensor.
pub fn pitch(tensor: &Tensor) -> Option<usize> {
    let (_, width) = tensor.dims2().ok()?;
    match tensor.stride() {
        _ if tensor.is_contiguous() => Some(width),
        [pitch, 1] if *pitch >= width => Some(*pitch),
        _ => None,
    }
}

/// A kernel.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// The file its text is in.
    pub file: &'static str,
    /// Its buffers, in order; the parameters follow them.
    pub buffers: &'static [Buffer],
    /// Bytes of its parameters.
    pub params_size: usize,
}

/// How many threadgroups of how many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Threadgroups in x, y and z; the last two at most 65,535.
    pub groups: [usize; 3],
    /// Threads of a threadgroup, a multiple of 32 and at most 1,024.
    pub threads: usize,
}

impl Grid {
    /// `groups` threadgroups in one row.
    pub fn line(groups: usize, threads: usize) -> Self {
        Self { groups: [groups, 1, 1], threads }
    }

    /// Enough threadgroups of 256 threads for `n` items, `each` to a thread.
    pub fn cover(n: usize, each: usize) -> Self {
        Self::line(n.div_ceil(256 * each).max(1), 256)
    }
}

/// A kernel with what it is to work on.
#[derive(Debug)]
pub struct Call<'a> {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// The dtype it is compiled for: f32, f16 or bf16.
    pub dtype: DType,
    /// Its threads.
    pub grid: Grid,
    /// Tensors in the order of the kernel's buffers: contiguous, or with a [`pitch`] where the kernel takes rows.
    pub buffers: &'a [&'a Tensor],
    /// The bytes of its parameters.
    pub params: &'a [u8],
}

impl Call<'_> {
    /// Launches it, unless there is nothing to do.
    pub fn launch(&self, gpu: &dyn Gpu) -> Result<()> {
        for (buffer, tensor) in self.kernel.buffers.iter().zip(self.buffers) {
            let refuse = |expected: String, got: String| {
                Err(Error::Buffer { kernel: self.kernel.name, buffer: buffer.name, expected, got })
            };
            let dtype = buffer.element.dtype(self.dtype);
            if tensor.dtype() != dtype {
                return refuse(format!("{dtype:?}"), format!("{:?}", tensor.dtype()));
            }
            if !(tensor.is_contiguous() || buffer.rows && pitch(tensor).is_some()) {
                let expected = if buffer.rows { "contiguous, or rows with a pitch" } else { "contiguous" };
                return refuse(expected.into(), format!("of strides {:?}", tensor.stride()));
            }
        }
        if self.grid.groups.contains(&0) {
            return Ok(());
        }
        LAUNCHED.with_borrow_mut(|launched| launched.as_mut().map(|launched| launched.insert(self.kernel.name)));
        gpu.launch(self)
    }
}

thread_local! {
    /// The names of kernels, while somebody asks for them.
    static LAUNCHED: RefCell<Option<BTreeSet<&'static str>>> = const { RefCell::new(None) };
}

/// Runs `f`, and returns with its result the names of the kernels that this thread launched meanwhile.
pub fn launches<T>(f: impl FnOnce() -> T) -> (T, BTreeSet<&'static str>) {
    LAUNCHED.set(Some(BTreeSet::new()));
    let result = f();
    (result, LAUNCHED.take().unwrap_or_default())
}
