//! Heads of consecutive tokens, and the buffers that a task keeps their packed forms in.

use bytemuck::Pod;

use crate::Element;
use crate::gemm::pack::Operand;

/// One head of some consecutive tokens: token `i` is `data[i * stride..][..head_dim]`.
#[derive(Clone, Copy)]
pub(crate) struct HeadRows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub head_dim: usize,
    pub tokens: usize,
}

impl<'a, T: Element> HeadRows<'a, T> {
    /// Head `head` of the tokens from `start` on, in `[_, heads, head_dim]`.
    pub(crate) fn new(data: &'a [T], start: usize, tokens: usize, heads: usize, head: usize, head_dim: usize) -> Self {
        Self {
            data: data.get((start * heads + head) * head_dim..).unwrap_or_default(),
            stride: heads * head_dim,
            head_dim,
            tokens,
        }
    }

    pub(crate) fn row(&self, token: usize) -> &'a [T] {
        &self.data[token * self.stride..][..self.head_dim]
    }

    /// The tokens from `first` on, at most `tokens`.
    pub(crate) fn part(self, first: usize, tokens: usize) -> Self {
        let tokens = tokens.min(self.tokens - first);
        Self { data: self.data.get(first * self.stride..).unwrap_or_default(), tokens, ..self }
    }

    /// With the tokens as lanes and the head as depth.
    pub(super) fn by_tokens(self) -> Operand<'a, T> {
        Operand { data: self.data, lane_stride: self.stride, depth_stride: 1 }
    }

    /// With the head as lanes and the tokens as depth.
    pub(super) fn by_head(self) -> Operand<'a, T> {
        Operand { data: self.data, lane_stride: 1, depth_stride: self.stride }
    }
}

/// Numbers of f32 in a cache line: parts of a buffer begin at one.
const LINE: usize = 16;

/// How many f32 hold `len` numbers of type `P`, in whole cache lines.
pub(super) fn room_for<P>(len: usize) -> usize {
    (len * size_of::<P>()).div_ceil(LINE * size_of::<f32>()) * LINE
}

/// A buffer from which parts are cut, whatever they hold.
pub(super) struct Cut<'a>(pub &'a mut [f32]);

impl<'a> Cut<'a> {
    /// The next `len` numbers, which take [`room_for`] them.
    pub(super) fn take<P: Pod>(&mut self, len: usize) -> &'a mut [P] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(room_for::<P>(len));
        self.0 = rest;
        &mut bytemuck::cast_slice_mut(part)[..len]
    }
}
