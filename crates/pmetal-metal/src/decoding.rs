//! What a device may have for making one token after another: products of one row and attention of one query, with their neighbours in the
//! same step, and all the steps of a token recorded once and asked for again and again.

use candle_core::{DType, Tensor};

use crate::{AttentionSpec, Result};

/// One token at a time on a device.
pub trait Decoding {
    /// Whether the device has kernels for a model of `dtype` whose heads are `spec`'s and whose products read rows as wide as `widths`.
    ///
    /// # Errors
    /// Where the device fails.
    fn decodes(&self, dtype: DType, spec: &AttentionSpec, widths: &[usize]) -> Result<bool>;

    /// Makes steps ready to be asked for, each behind the one before, on the memory that their tensors have now: whoever keeps the recording
    /// keeps the tensors.
    ///
    /// # Errors
    /// Where an operand does not fit the others or the device fails.
    fn record(&self, steps: &[RowStep]) -> Result<Box<dyn Recording>>;
}

/// Work that can be asked for again, on the tensors it was recorded with.
pub trait Recording: Send {
    /// Asks for it behind what was asked for before.
    ///
    /// # Errors
    /// Where the device fails.
    fn replay(&self) -> Result<()>;
}

/// A step of a token's way.
#[derive(Clone, Debug)]
pub enum RowStep<'a> {
    /// A product.
    Product(RowProduct<'a>),
    /// An attention.
    Attention(RowAttention<'a>),
}

/// `y = op(norm(x) Wᵀ + bias) + residual` for one row `x`.
#[derive(Clone, Debug)]
pub struct RowProduct<'a> {
    /// `[n_i, k]` each, at most three, of contiguous rows: their results lie behind one another. Gated, the gate's and the up projection's.
    pub weights: Vec<&'a Tensor>,
    /// `[1, k]`, contiguous.
    pub x: &'a Tensor,
    /// The weight `[k]` of the root-mean-square norm that `x` passes first, and what is added to its mean square.
    pub norm: Option<(&'a Tensor, f32)>,
    /// As long as all the weights' rows.
    pub bias: Option<&'a Tensor>,
    /// `[1, n]`: what the product is added to; may be `y`.
    pub residual: Option<&'a Tensor>,
    /// Whether `y = silu(gate) * up`, and `n` the rows of one weight; else `y` has all their rows.
    pub gated: bool,
    /// `[1, n]`, of the dtype of `x` or f32.
    pub y: &'a Tensor,
}

/// Attention of one new token over those in a cache, which it joins. The query and the key are normalised where there are norms, and turned
/// by the angles of their place.
#[derive(Clone, Debug)]
pub struct RowAttention<'a> {
    /// `[1, (heads + 2 * kv_heads) * head_dim]`: queries, key, value.
    pub qkv: &'a Tensor,
    /// The weights `[head_dim]` of the norms of every query's and every key's head.
    pub head_norms: Option<[&'a Tensor; 2]>,
    /// What is added to the mean square inside these norms.
    pub eps: f32,
    /// `[head_dim / 2]` f32: the angle of each pair of a head at place 1.
    pub inv_freq: &'a Tensor,
    /// `[1]` u32: how many tokens are in the cache, which is this token's place.
    pub position: &'a Tensor,
    /// `[capacity, ..]`, each place `kv_heads * head_dim` elements: gets the new key.
    pub keys: &'a Tensor,
    /// The same for values.
    pub values: &'a Tensor,
    /// `[1, heads * head_dim]`.
    pub out: &'a Tensor,
    /// Heads and scale.
    pub spec: AttentionSpec,
}
