//! Attention over packed rows as graphs of primitive operations: what cuDNN recognises as one fused kernel.
//!
//! Each row `b` has `q`, `k`, `v` of shape `[heads, length_b, d]`, somewhere in tensors of tokens, whose rows may have a pitch. With
//! `s = scale · q·kᵀ`, causal, where there is a window of its keys alone: `stats = log Σ exp s`, `p = exp(s − stats)`, `out = p·v`; backward
//! `dv = pᵀ·dout`, `ds = p · (dout·vᵀ − Σ dout·out) · scale`, `dq = ds·k`, `dk = dsᵀ·q`. Where scores have a cap,
//! `s = cap · t` with `t = tanh(scale · q·kᵀ / cap)`, and `ds` is times `1 − t²`. A key head's gradients are the sums over the query heads that share it.

use std::{ffi::c_void, sync::Arc};

use pmetal_metal::Result;

use super::{
    graph::{Graph, Layout, Node, Number, Plan, Pointwise, Reduction},
    library::Library,
};

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Rows at most; those that are not there have length 0.
    pub(super) rows: usize,
    /// Tokens of the longest row at most.
    pub(super) length: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// F16 or Bf16.
    pub(super) number: Number,
    /// Whether the backward adds up in a fixed order.
    pub(super) deterministic: bool,
    /// Whether a query sees no more than a window of keys.
    pub(super) windowed: bool,
    /// Whether scores have a cap.
    pub(super) capped: bool,
    pub(super) pitches: Pitches,
}

/// Elements from one token of a tensor to the next; gradients are contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pitches {
    pub(super) q: usize,
    pub(super) k: usize,
    pub(super) v: usize,
    pub(super) out: usize,
}

/// How many [`Shape::widths`] there are.
pub(super) const WIDTHS: usize = 7;

/// What a plan wants a pointer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Q,
    K,
    V,
    Out,
    Dout,
    Dq,
    Dk,
    Dv,
    /// f32 `[tokens, heads]`.
    Stats,
    /// i64 `[rows + 1]`: where rows begin in a tensor with so many elements to a token.
    Offsets(usize),
    /// i32 `[rows]`.
    Lengths,
    /// Scratch: f32 `[tokens, heads, d]`, f32 `[tokens, heads]`, and two of the numbers' dtype `[tokens, heads, d]`.
    DqSum,
    RowSum,
    DkHeads,
    DvHeads,
    /// f32 on the host.
    Scale,
    MinusInfinity,
    One,
    Window,
    Cap,
}

/// A plan and what it wants.
pub(super) struct Attention {
    plan: Plan,
    slots: Vec<(Node, Slot)>,
}

impl Attention {
    /// Bytes of scratch memory.
    pub(super) const fn workspace(&self) -> usize {
        self.plan.workspace
    }

    /// Runs the plan on what `address` finds for each slot.
    pub(super) fn run(&self, address: impl Fn(Slot) -> *mut c_void, workspace: *mut c_void) -> Result<()> {
        let tensors: Vec<_> = self.slots.iter().map(|&(node, slot)| (node, address(slot))).collect();
        self.plan.run(&tensors, workspace)
    }

    /// Fills `Out` and `Stats`.
    pub(super) fn forward(library: &Arc<Library>, shape: Shape) -> Result<Self> {
        let mut draft = Draft::new(library, shape)?;
        let q = draft.ragged(Slot::Q)?;
        let k = draft.ragged_transposed(Slot::K)?;
        let v = draft.ragged(Slot::V)?;
        let out = draft.ragged(Slot::Out)?;
        let stats = draft.ragged(Slot::Stats)?;
        let (queries, keys) = (draft.queries, draft.keys);
        let column = draft.column();
        let graph = &mut draft.graph;

        let scores = graph.hidden(Number::F32, shape.scores())?;
        graph.matmul(q, k, scores, [Some(queries), Some(keys), None])?;
        let scores = draft.scaled(scores)?;
        let (scores, _) = draft.capped(scores)?;
        let scores = draft.masked_to_lengths(scores)?;
        let scores = draft.masked_causally(scores)?;
        let scores = draft.masked_to_window(scores)?;
        let graph = &mut draft.graph;

        let most = graph.hidden(Number::F32, column)?;
        graph.reduce(Reduction::Max, scores, most)?;
        let shifted = graph.pointwise(Pointwise::Sub, Number::F32, &[scores, most])?;
        let exponentials = graph.pointwise(Pointwise::Exp, Number::F32, &[shifted])?;
        let sum = graph.hidden(Number::F32, column)?;
        graph.reduce(Reduction::Add, exponentials, sum)?;
        let log = graph.pointwise(Pointwise::Log, Number::F32, &[sum])?;
        graph.pointwise_into(Pointwise::Add, Number::F32, None, &[most, log], stats)?;
        let p = graph.hidden(shape.number, shape.scores())?;
        graph.pointwise_into(Pointwise::Div, Number::F32, None, &[exponentials, sum], p)?;
        graph.matmul(p, v, out, [Some(queries), None, Some(keys)])?;
        draft.finish()
    }

    /// Fills `Dq`, `Dk` and `Dv`.
    pub(super) fn backward(library: &Arc<Library>, shape: Shape) -> Result<Self> {
        let mut draft = Draft::new(library, shape)?;
        let q = draft.ragged(Slot::Q)?;
        let k = draft.ragged_transposed(Slot::K)?;
        let v = draft.ragged_transposed(Slot::V)?;
        let out = draft.ragged(Slot::Out)?;
        let dout = draft.ragged(Slot::Dout)?;
        let stats = draft.ragged(Slot::Stats)?;
        let row_sum = draft.row_sum(dout, out)?;
        let (queries, keys) = (draft.queries, draft.keys);

        let scores = draft.graph.hidden(Number::F32, shape.scores())?;
        draft.graph.matmul(q, k, scores, [Some(queries), Some(keys), None])?;
        let scores = draft.scaled(scores)?;
        let (scores, tangents) = draft.capped(scores)?;
        let scores = draft.graph.pointwise(Pointwise::Sub, Number::F32, &[scores, stats])?;
        let scores = draft.masked_to_lengths(scores)?;
        let scores = draft.masked_causally(scores)?;
        let scores = draft.masked_to_window(scores)?;
        let p = draft.graph.pointwise(Pointwise::Exp, Number::F32, &[scores])?;
        draft.key_gradient(p, dout, Slot::Dv, Slot::DvHeads)?;

        let dp = draft.graph.hidden(Number::F32, shape.scores())?;
        draft.graph.matmul(dout, v, dp, [Some(queries), Some(keys), None])?;
        let centred = draft.graph.pointwise(Pointwise::Sub, Number::F32, &[dp, row_sum])?;
        let ds = draft.graph.pointwise(Pointwise::Mul, Number::F32, &[centred, p])?;
        let ds = draft.uncapped(ds, tangents)?;
        let ds = draft.scaled(ds)?;
        draft.key_gradient(ds, q, Slot::Dk, Slot::DkHeads)?;
        draft.query_gradient(ds, k)?;
        draft.finish()
    }
}

impl Shape {
    const fn sizes(&self) -> [i64; 5] {
        [self.rows as i64, self.length as i64, self.heads as i64, self.kv_heads as i64, self.head_dim as i64]
    }

    const fn scores(&self) -> Layout {
        let [b, s, h, _, _] = self.sizes();
        Layout::plain([b, h, s, s])
    }

    /// A tensor of tokens with `heads` heads of width `width`, seen row by row.
    const fn tokens(&self, heads: i64, width: i64, pitch: i64) -> Layout {
        let [b, s, ..] = self.sizes();
        Layout { dims: [b, heads, s, width], strides: [s * pitch, width, pitch, 1] }
    }

    /// The widths of all [`Slot::Offsets`].
    pub(super) const fn widths(&self) -> [usize; WIDTHS] {
        let Pitches { q, k, v, out } = self.pitches;
        [q, k, v, out, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.heads]
    }
}

/// A graph in the making and what it wants.
struct Draft {
    graph: Graph,
    slots: Vec<(Node, Slot)>,
    shape: Shape,
    queries: Node,
    keys: Node,
}

impl Draft {
    fn new(library: &Arc<Library>, shape: Shape) -> Result<Self> {
        let mut graph = Graph::new(library.clone());
        let lengths = Layout::plain([shape.rows as i64, 1, 1, 1]);
        let queries = graph.tensor(Number::I32, lengths, None)?;
        let keys = graph.tensor(Number::I32, lengths, None)?;
        let slots = vec![(queries, Slot::Lengths), (keys, Slot::Lengths)];
        Ok(Self { graph, slots, shape, queries, keys })
    }

    fn finish(self) -> Result<Attention> {
        Ok(Attention { plan: self.graph.plan()?, slots: self.slots })
    }

    /// One number for each query.
    const fn column(&self) -> Layout {
        let [b, s, h, _, _] = self.shape.sizes();
        Layout::plain([b, h, s, 1])
    }

    /// Dtype, layout and offsets of a slot's tensor.
    fn form(&self, slot: Slot) -> (Number, Layout, usize) {
        let (shape, Pitches { q, k, v, out }) = (&self.shape, self.shape.pitches);
        let ([_, _, heads, kv_heads, d], number) = (shape.sizes(), shape.number);
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let of_queries = |number, pitch: usize| (number, shape.tokens(heads, d, pitch as i64), pitch);
        let of_keys = |pitch: usize| (number, shape.tokens(kv_heads, d, pitch as i64), pitch);
        match slot {
            Slot::K => of_keys(k),
            Slot::V => of_keys(v),
            Slot::Dk | Slot::Dv => of_keys(keys),
            // its offsets are those of the sums over it, which have fewer heads
            Slot::DkHeads | Slot::DvHeads => (number, shape.tokens(heads, d, queries as i64), keys),
            Slot::Stats | Slot::RowSum => (Number::F32, shape.tokens(heads, 1, heads), shape.heads),
            Slot::DqSum => of_queries(Number::F32, queries),
            Slot::Q => of_queries(number, q),
            Slot::Out => of_queries(number, out),
            _ => of_queries(number, queries),
        }
    }

    fn offsets(&mut self, width: usize) -> Result<Node> {
        let node = self.graph.tensor(Number::I64, Layout::plain([self.shape.rows as i64 + 1, 1, 1, 1]), None)?;
        self.slots.push((node, Slot::Offsets(width)));
        Ok(node)
    }

    fn ragged(&mut self, slot: Slot) -> Result<Node> {
        let (number, layout, offsets) = self.form(slot);
        let offsets = self.offsets(offsets)?;
        self.provided(slot, number, layout, offsets)
    }

    fn ragged_transposed(&mut self, slot: Slot) -> Result<Node> {
        let (number, layout, offsets) = self.form(slot);
        let offsets = self.offsets(offsets)?;
        self.provided(slot, number, layout.transposed(), offsets)
    }

    fn provided(&mut self, slot: Slot, number: Number, layout: Layout, offsets: Node) -> Result<Node> {
        let node = self.graph.tensor(number, layout, Some(offsets))?;
        self.slots.push((node, slot));
        Ok(node)
    }

    fn scalar(&mut self, slot: Slot) -> Result<Node> {
        let node = self.graph.scalar(Number::F32)?;
        self.slots.push((node, slot));
        Ok(node)
    }

    fn scaled(&mut self, x: Node) -> Result<Node> {
        let scale = self.scalar(Slot::Scale)?;
        self.graph.pointwise(Pointwise::Mul, Number::F32, &[x, scale])
    }

    /// Where scores have a cap: what they become, and the tangents that the cap was multiplied with.
    fn capped(&mut self, scores: Node) -> Result<(Node, Option<Node>)> {
        if !self.shape.capped {
            return Ok((scores, None));
        }
        let cap = self.scalar(Slot::Cap)?;
        let inner = self.graph.pointwise(Pointwise::Div, Number::F32, &[scores, cap])?;
        let tangents = self.graph.pointwise(Pointwise::Tanh, Number::F32, &[inner])?;
        Ok((self.graph.pointwise(Pointwise::Mul, Number::F32, &[tangents, cap])?, Some(tangents)))
    }

    /// Gradients of scores with a cap become those of scores without: `ds − ds · t²`.
    fn uncapped(&mut self, ds: Node, tangents: Option<Node>) -> Result<Node> {
        let Some(tangents) = tangents else { return Ok(ds) };
        let squares = self.graph.pointwise(Pointwise::Mul, Number::F32, &[tangents, tangents])?;
        let lost = self.graph.pointwise(Pointwise::Mul, Number::F32, &[ds, squares])?;
        self.graph.pointwise(Pointwise::Sub, Number::F32, &[ds, lost])
    }

    /// Minus infinity beyond a row's length.
    fn masked_to_lengths(&mut self, scores: Node) -> Result<Node> {
        let query = self.graph.index(scores, Number::I32, 2)?;
        let key = self.graph.index(scores, Number::I32, 3)?;
        let query = self.graph.compare(Pointwise::Less, query, self.queries)?;
        let key = self.graph.compare(Pointwise::Less, key, self.keys)?;
        let inside = self.graph.compare(Pointwise::And, query, key)?;
        self.selected(scores, inside)
    }

    /// Minus infinity where the key comes after the query.
    fn masked_causally(&mut self, scores: Node) -> Result<Node> {
        let query = self.graph.index(scores, Number::F32, 2)?;
        let key = self.graph.index(scores, Number::F32, 3)?;
        let past = self.graph.compare(Pointwise::GreaterOrEqual, query, key)?;
        self.selected(scores, past)
    }

    /// Minus infinity where the key comes a window or more before the query. In f32 throughout, as the library's pattern has it.
    fn masked_to_window(&mut self, scores: Node) -> Result<Node> {
        if !self.shape.windowed {
            return Ok(scores);
        }
        let query = self.graph.index_kept(scores, Number::F32, 2)?;
        let key = self.graph.index_kept(scores, Number::F32, 3)?;
        let window = self.scalar(Slot::Window)?;
        let end = self.graph.pointwise(Pointwise::Add, Number::F32, &[key, window])?;
        let near = self.graph.compare(Pointwise::Greater, end, query)?;
        self.selected(scores, near)
    }

    fn selected(&mut self, scores: Node, kept: Node) -> Result<Node> {
        let nothing = self.scalar(Slot::MinusInfinity)?;
        self.graph.pointwise(Pointwise::Select, Number::F32, &[scores, nothing, kept])
    }

    /// `Σ dout·out` over a head's width.
    fn row_sum(&mut self, dout: Node, out: Node) -> Result<Node> {
        let [b, s, h, _, d] = self.shape.sizes();
        let column = self.column();
        let one = self.scalar(Slot::One)?;
        let product = self.graph.hidden(Number::F32, Layout::plain([b, h, s, d]))?;
        self.graph.pointwise_into(Pointwise::Mul, Number::F32, None, &[dout, out], product)?;
        let sum = self.graph.hidden(Number::F32, column)?;
        self.graph.reduce(Reduction::Add, product, sum)?;
        let row_sum = self.ragged(Slot::RowSum)?;
        // the library's pattern has dropout's factor here
        self.graph.pointwise_into(Pointwise::Mul, Number::F32, None, &[sum, one], row_sum)?;
        Ok(row_sum)
    }

    /// `scoresᵀ · other`, added up over the query heads of each key head.
    fn key_gradient(&mut self, scores: Node, other: Node, slot: Slot, per_head: Slot) -> Result<()> {
        let (queries, keys) = (self.queries, self.keys);
        let turned = self.graph.reshaped(scores, self.shape.number, self.shape.scores().transposed())?;
        let lengths = [Some(keys), None, Some(queries)];
        let (number, layout, offsets) = self.form(slot);
        let offsets = self.offsets(offsets)?;
        if self.shape.heads == self.shape.kv_heads {
            let gradient = self.provided(slot, number, layout, offsets)?;
            return self.graph.matmul(turned, other, gradient, lengths);
        }
        let (_, all, _) = self.form(per_head);
        let full = self.provided(per_head, number, all, offsets)?;
        self.graph.matmul(turned, other, full, lengths)?;
        let gradient = self.provided(slot, number, layout, offsets)?;
        self.graph.reduce(Reduction::Add, full, gradient)
    }

    /// `ds · k`, added up in f32 by whoever comes first, or else in order through a matrix of scores in memory.
    fn query_gradient(&mut self, ds: Node, k_transposed: Node) -> Result<()> {
        let (queries, keys) = (self.queries, self.keys);
        let (_, of_keys, _) = self.form(Slot::K);
        let k = self.graph.reshaped(k_transposed, Number::F32, of_keys)?;
        let lengths = [Some(queries), None, Some(keys)];
        if self.shape.deterministic {
            let dq = self.ragged(Slot::Dq)?;
            return self.graph.matmul(ds, k, dq, lengths);
        }
        let sum = self.ragged(Slot::DqSum)?;
        self.graph.matmul(ds, k, sum, lengths)?;
        let dq = self.ragged(Slot::Dq)?;
        self.graph.pointwise_into(Pointwise::Identity, Number::F32, None, &[sum], dq)
    }
}
