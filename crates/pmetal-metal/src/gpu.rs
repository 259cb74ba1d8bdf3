//! What a GPU does for the operations.

use candle_core::{DType, Device, Shape, Tensor};

use crate::{
    AttentionRows, Call, Decoding, Error, LowRankBackward, Marks, Part, PartTable, Resting, Result, low_rank_inputs,
    low_rank_outputs, pitch,
};

/// A GPU, or what plays one.
pub trait Gpu: Send + Sync {
    /// Runs a kernel behind everything that was asked for before.
    fn launch(&self, call: &Call) -> Result<()>;

    /// Runs a matrix product.
    fn gemm(&self, product: &Gemm) -> Result<()>;

    /// The gradients of the members' adapters and of `u`: `du = scale * dy · b`, then `dA (+)= duᵀ · x` and `dB (+)= dyᵀ · u`.
    ///
    /// # Errors
    /// Where the operands do not fit one another.
    fn low_rank_backward(&self, work: &LowRankBackward) -> Result<()> {
        low_rank_outputs(self, work)?;
        low_rank_inputs(self, work)
    }

    /// Attention on matrix units: fills `out` and returns its statistics, which the backward needs beside it; none where this device has no
    /// such kernel for the dtype, the rows or what `spec` says. `q` and `out` are `[tokens, heads * head_dim]`, `k` and `v` `[kv_tokens,
    /// kv_heads * head_dim]`, of contiguous rows ([`pitch`]) that begin at multiples of 8 elements where heads are a multiple of 8 wide.
    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<Option<Statistics>>;

    /// The backward of [`Gpu::attention_forward`], which returned `stats` (here in one dimension): fills `[dq, dk, dv]`, all of the same
    /// form.
    #[allow(clippy::too_many_arguments, reason = "what the formula needs")]
    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: [&Tensor; 3],
        out: &Tensor,
        stats: &Tensor,
        grads: [&Tensor; 3],
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<()>;

    /// Starts the copy of a tensor to the host's memory, behind what was asked for before and beside what is asked for after; none where the
    /// device has no memory of its own to save, as on a Mac.
    ///
    /// # Errors
    /// Where the device fails or the host has no room.
    fn rest(&self, _tensor: &Tensor) -> Result<Option<Box<dyn Resting>>> {
        Ok(None)
    }

    /// What it has for making one token after another; none where that is what it has for many.
    fn decoding(&self) -> Option<&dyn Decoding> {
        None
    }

    /// A table for [`Gpu::place`] of parts of one flat tensor, for as long as their matrices stay where they lie; none where the device has no
    /// kernel for many matrices at a time.
    ///
    /// # Errors
    /// Where the device has no room for it.
    fn part_table(&self, _parts: &[Part]) -> Result<Option<PartTable>> {
        Ok(None)
    }

    /// Copies the parts of `values` (f32) to their places in matrices that are all still there, rounded to their dtype.
    ///
    /// # Errors
    /// Where the table is none of this device's.
    fn place(&self, _values: &Tensor, _table: &PartTable) -> Result<()> {
        let reason = "it makes no tables of parts".into();
        Err(Error::Device { device: self.facts().name, reason })
    }

    /// Waits for all that was asked for.
    fn synchronize(&self) -> Result<()>;

    /// Memory, as the device's allocator counts it.
    fn memory(&self) -> Result<Memory>;

    /// Starts the peak anew.
    fn reset_peak(&self) -> Result<()>;

    /// What the device is.
    fn facts(&self) -> Facts;

    /// Marks on this device's work.
    ///
    /// # Errors
    /// Where the device does not tell when it passes a point.
    fn marks(&self) -> Result<Box<dyn Marks>> {
        let reason = "its operations cannot be timed one by one; CUDA's and the CPU's can".into();
        Err(Error::Device { device: self.facts().name, reason })
    }
}

/// `c = alpha * op(a) · op(b) + beta * c`, all two-dimensional with contiguous rows ([`pitch`]), accumulated in f32. Of a `c` that is a column
/// range of a wider tensor nothing else is touched.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// `[m, k]`, or `[k, m]` where it is transposed.
    pub a: &'a Tensor,
    /// Whether `a` is read as its transpose.
    pub a_transposed: bool,
    /// `[k, n]`, or `[n, k]` where it is transposed; of the dtype of `a`.
    pub b: &'a Tensor,
    /// Whether `b` is read as its transpose.
    pub b_transposed: bool,
    /// `[m, n]`, of the dtype of `a` or f32.
    pub c: &'a Tensor,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what `c` held; 0 reads nothing of it.
    pub beta: f32,
}

impl Gemm<'_> {
    /// `[m, n, k]`.
    ///
    /// # Errors
    /// Where the operands do not fit one another.
    pub fn sizes(&self) -> Result<[usize; 3]> {
        let of = |tensor: &Tensor, transposed: bool| -> Result<(usize, usize)> {
            let (rows, columns) = tensor.dims2()?;
            Ok(if transposed { (columns, rows) } else { (rows, columns) })
        };
        let (m, k) = of(self.a, self.a_transposed)?;
        let (b_k, n) = of(self.b, self.b_transposed)?;
        let dtype = self.a.dtype();
        if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
            return Err(misfit("a", "f32, f16 or bf16".into(), self.a));
        }
        if b_k != k || self.b.dtype() != dtype {
            return Err(misfit("b", format!("[{k}, n] of {dtype:?} after transposing"), self.b));
        }
        if self.c.dims2()? != (m, n) || ![dtype, DType::F32].contains(&self.c.dtype()) {
            return Err(misfit("c", format!("[{m}, {n}] of {dtype:?} or F32"), self.c));
        }
        for (name, tensor) in [("a", self.a), ("b", self.b), ("c", self.c)] {
            if pitch(tensor).is_none() {
                return Err(misfit(name, "contiguous rows".into(), tensor));
            }
        }
        Ok([m, n, k])
    }
}

fn misfit(buffer: &'static str, expected: String, tensor: &Tensor) -> Error {
    let got = format!("{:?} of {:?}, strides {:?}", tensor.dims(), tensor.dtype(), tensor.stride());
    Error::Buffer { kernel: "gemm", buffer, expected, got }
}

/// What an attention on matrix units keeps of each query's softmax: the logarithm of the sum of exponentials of its scores, f32.
#[derive(Clone, Debug)]
pub enum Statistics {
    /// The natural one, `[tokens, heads]`.
    Natural(Tensor),
    /// That to the base of 2, `[heads, tokens]`.
    Binary(Tensor),
}

/// What a query sees of the keys up to its own. Positions count from the row's first key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reach {
    /// All of them.
    #[default]
    All,
    /// The last so many, its own among them.
    Window(usize),
    /// Those of its own chunk, `position / n`.
    Chunk(usize),
}

impl Reach {
    /// The first key that the query at `position` sees.
    pub const fn first(self, position: usize) -> usize {
        match self {
            Self::All | Self::Chunk(0) => 0,
            Self::Window(keys) => (position + 1).saturating_sub(keys),
            Self::Chunk(keys) => position / keys * keys,
        }
    }

    /// The same over rows of at most `keys` keys: what reaches over all of them is [`Reach::All`].
    #[must_use]
    pub const fn within(self, keys: usize) -> Self {
        match self {
            Self::Window(own) | Self::Chunk(own) if own < keys => self,
            _ => Self::All,
        }
    }
}

/// What is constant over the rows of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores, as a rule `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// What each query sees.
    pub reach: Reach,
    /// Scaled scores become `cap * tanh(score / cap)`, before the mask.
    pub softcap: Option<f32>,
}

impl AttentionSpec {
    /// Whether queries see every key up to their own and scores have no cap: what kernels take that know of neither.
    pub const fn is_plain(&self) -> bool {
        matches!(self.reach, Reach::All) && self.softcap.is_none()
    }
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// In use by tensors now.
    pub live: u64,
    /// The most since the peak was reset.
    pub peak: u64,
    /// What a program may use.
    pub total: u64,
}

/// What a device is.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Its driver's version, or its system's.
    pub driver: String,
    /// What it can do, for people.
    pub features: Vec<String>,
}

/// A tensor that nothing has been written to: for kernels that write all of it.
pub fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    if let Device::Metal(metal) = device {
        crate::metal::reserve(metal, shape.elem_count() * dtype.size_in_bytes())?;
    }
    // SAFETY: every caller hands it to a kernel that writes every element before anything reads one; floats and integers have no
    // bit pattern that is not a number.
    Ok(unsafe { Tensor::empty(shape, dtype, device) }?)
}
