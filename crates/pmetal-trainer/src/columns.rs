//! What a layer computes for each token, in columns.

use pmetal_models::{AttentionKind, ExpertsSpec, GatedSpec, HeadsSpec, LatentSpec, LayerSpec, MlpSpec, NormPlaces};

/// Columns of what a layer computes for each token, and multiplications by which it does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns {
    /// The residual stream.
    pub(crate) hidden: u64,
    /// Streams and norms of them.
    pub(crate) streams: u64,
    /// What a norm behind attention, or behind the MLP, reads.
    pub(crate) behind: u64,
    /// Whether the MLP reads a stream that attention has been added to.
    pub(crate) has_middle: bool,
    pub(crate) attention: AttentionColumns,
    pub(crate) mlp: MlpColumns,
    /// Vectors of f32, a number for each token.
    pub(crate) statistics: u64,
    /// Products of its adapter's halves, where each is of rank 1.
    pub(crate) linears: u64,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AttentionColumns {
    pub(crate) heads: u64,
    /// Projections of the stream.
    pub(crate) projections: u64,
    /// Queries, and as many of results; keys.
    pub(crate) q: u64,
    pub(crate) k: u64,
    /// What the output projection reads.
    pub(crate) output: u64,
    /// What stands between projections, attention and the output projection.
    pub(crate) between: u64,
    /// What of that stays beside the projections.
    pub(crate) between_stays: u64,
    /// Multiplications between them.
    pub(crate) again: u64,
    /// Keys that a query picks.
    pub(crate) picks: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MlpColumns {
    /// Gate and up of what every token goes through.
    pub(crate) gates: u64,
    /// The product of the two.
    pub(crate) product: u64,
    /// Rows of experts: what they read, gate, up and their product, what they return.
    pub(crate) experts: u64,
    /// Multiplications of experts and their router.
    pub(crate) again: u64,
}

impl Columns {
    pub(crate) fn of(layer: &LayerSpec, hidden: usize) -> Self {
        let hidden = hidden as u64;
        let (attention, norms_heads, attention_linears) = match &layer.attention {
            AttentionKind::Heads(heads) => of_heads(heads),
            AttentionKind::Latent(latent) => of_latent(latent, hidden),
        };
        let (mlp, mlp_linears, router) = match &layer.mlp {
            MlpSpec::Gated(gated) => (of_gated(gated), linears(gated), 0),
            MlpSpec::Experts(experts) => of_experts(experts, hidden),
        };
        let norms = match layer.norms {
            NormPlaces::Before => 2,
            NormPlaces::Around => 4,
            NormPlaces::Shared => 1,
        };
        let behind = if layer.norms == NormPlaces::Around { hidden } else { 0 };
        Self {
            hidden,
            streams: 2 * hidden * if layer.norms == NormPlaces::Shared { 1 } else { 2 },
            behind,
            has_middle: layer.norms != NormPlaces::Shared,
            attention,
            mlp,
            statistics: attention.heads * if norms_heads { 3 } else { 1 } + norms + router,
            linears: attention_linears + mlp_linears,
        }
    }
}

fn of_heads(spec: &HeadsSpec) -> (AttentionColumns, bool, u64) {
    let attention = &spec.attention;
    let [q, k] = [attention.heads, attention.kv_heads].map(|heads| (heads * attention.head_dim) as u64);
    let norms_heads = spec.head_norm.is_some();
    let columns = AttentionColumns {
        heads: attention.heads as u64,
        projections: q + 2 * k,
        q,
        k,
        output: q,
        between: q + k,
        between_stays: if norms_heads { q + k } else { 0 },
        ..Default::default()
    };
    (columns, norms_heads, if spec.fused { 2 } else { 4 })
}

/// Keys, queries and values have one width in attention, whatever their own.
fn of_latent(spec: &LatentSpec, hidden: u64) -> (AttentionColumns, bool, u64) {
    let heads = spec.heads as u64;
    let [rank, kept, own, value] =
        [spec.kv_lora_rank, spec.kept_width(), spec.qk_head_dim(), spec.v_head_dim].map(|columns| columns as u64);
    let both = heads * (spec.qk_nope_head_dim as u64 + value);
    let wide = heads * own.max(value);
    // short rows, before and behind their norms
    let (first, short) = match spec.q_lora_rank {
        Some(rank) => (rank as u64, rank as u64),
        None => (heads * own, 0),
    };
    let cut = if wide == heads * value { 0 } else { heads * value };
    let between = short + 2 * rank + 3 * wide + cut;
    let indexer = spec.indexer.as_ref().map_or(0, |indexer| {
        let width = (indexer.heads * indexer.head_dim) as u64;
        short * width + hidden * (indexer.head_dim + indexer.heads) as u64
    });
    let columns = AttentionColumns {
        heads,
        projections: first + kept,
        q: wide,
        k: wide,
        output: heads * value,
        between,
        between_stays: between,
        again: short * heads * own + rank * both + indexer,
        picks: spec.indexer.as_ref().map(|indexer| indexer.top_k as u64),
    };
    let linears = if short > 0 { 5 } else { 4 };
    (columns, false, linears + if spec.indexer.is_some() { 3 } else { 0 })
}

fn linears(spec: &GatedSpec) -> u64 {
    if spec.fused { 2 } else { 3 }
}

fn of_gated(spec: &GatedSpec) -> MlpColumns {
    let inner = spec.intermediate_size as u64;
    MlpColumns { gates: 2 * inner, product: inner, ..Default::default() }
}

/// Rows are gathered for each expert, so that there are `top_k` for each token.
fn of_experts(spec: &ExpertsSpec, hidden: u64) -> (MlpColumns, u64, u64) {
    let shared = spec.shared.as_ref();
    let (top_k, inner) = (spec.router.top_k as u64, spec.expert.intermediate_size as u64);
    let count = spec.router.experts as u64;
    let columns = MlpColumns {
        experts: top_k * (2 * hidden + 3 * inner) + count,
        again: hidden * (3 * top_k * inner + count),
        ..shared.map(of_gated).unwrap_or_default()
    };
    (columns, 2 * top_k + shared.map_or(0, linears), 2 * (count + top_k))
}
