//! A decoder as numbers and choices.

use pmetal_ops::{Activation, AttentionSpec, LogitsSpec, RmsNorm, RopeLayout, RouterSpec};

use crate::{RopeSpec, names::Names};

/// A decoder as numbers and choices: everything a family's `config.json` decides.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The family, as `model_type` in `config.json`.
    pub model_type: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The layers, in order.
    pub layers: Vec<LayerSpec>,
    /// Rotary position embeddings, which layers name by their index.
    pub ropes: Vec<RopeUse>,
    /// The norms of the residual stream.
    pub norm: NormSpec,
    /// Factor on the embedding's rows, in the dtype of the activations.
    pub embedding_multiplier: f64,
    /// What happens to the head's products before they are logits.
    pub logits: LogitsSpec,
    /// Coefficient of the routers' balancing loss, where training adds it.
    pub router_loss: Option<f64>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// What its parts are called.
    pub names: Names,
}

impl DecoderSpec {
    /// Layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    /// What a layer's experts ask of their router; none where no layer has experts.
    pub fn router(&self) -> Option<&RouterSpec> {
        self.layers.iter().find_map(|layer| match &layer.mlp {
            MlpSpec::Experts(experts) => Some(&experts.router),
            MlpSpec::Gated(_) => None,
        })
    }

    /// Products of its widths, which are about as many as it has parameters.
    pub(crate) fn rough_parameters(&self) -> u128 {
        let wide = |n: usize| n as u128;
        let layer = |layer: &LayerSpec| {
            let (attention, rank) = match &layer.attention {
                AttentionKind::Heads(heads) => {
                    let AttentionSpec { heads, kv_heads, head_dim, .. } = heads.attention;
                    (wide(heads + 2 * kv_heads) * wide(head_dim), 0)
                }
                AttentionKind::Latent(latent) => {
                    let each = latent.qk_head_dim() + latent.qk_nope_head_dim + latent.v_head_dim;
                    let indexer =
                        latent.indexer.as_ref().map_or(0, |indexer| wide(indexer.heads) * wide(indexer.head_dim));
                    (
                        wide(latent.heads) * wide(each) + indexer,
                        latent.kept_width().max(latent.q_lora_rank.unwrap_or(0)),
                    )
                }
            };
            let mlp = match &layer.mlp {
                MlpSpec::Gated(gated) => wide(gated.intermediate_size),
                MlpSpec::Experts(experts) => {
                    let shared = experts.shared.as_ref().map_or(0, |shared| wide(shared.intermediate_size));
                    wide(experts.router.experts) * wide(experts.expert.intermediate_size) + shared
                }
            };
            (attention + mlp) * wide(self.hidden_size.max(rank))
        };
        wide(self.vocab_size) * wide(self.hidden_size) + self.layers.iter().map(layer).sum::<u128>()
    }
}

/// A rotary position embedding and the columns of a head that it turns.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeUse {
    /// How fast each pair turns.
    pub rope: RopeSpec,
    /// Where the pairs lie.
    pub layout: RopeLayout,
}

/// How the residual stream is normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormSpec {
    /// By the root mean square.
    Rms(RmsNorm),
    /// By mean and variance, without a bias.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

/// One layer: attention and an MLP on a residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// How tokens see one another.
    pub attention: AttentionKind,
    /// What each token goes through alone.
    pub mlp: MlpSpec,
    /// Where its norms stand.
    pub norms: NormPlaces,
    /// Factor on what attention and MLP add to the stream.
    pub residual_multiplier: f64,
}

/// Where a layer's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before attention and before the MLP.
    Before,
    /// Before and behind each of them.
    Around,
    /// One, whose result both read at once.
    Shared,
}

/// How tokens see one another.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionKind {
    /// Keys and values are projections of the stream.
    Heads(HeadsSpec),
    /// Keys and values are projections of a short row.
    Latent(LatentSpec),
}

impl AttentionKind {
    /// Query heads.
    pub fn heads(&self) -> usize {
        match self {
            Self::Heads(heads) => heads.attention.heads,
            Self::Latent(latent) => latent.heads,
        }
    }

    /// Width of all queries of a token.
    pub fn width(&self) -> usize {
        match self {
            Self::Heads(heads) => heads.attention.heads * heads.attention.head_dim,
            Self::Latent(latent) => latent.heads * latent.qk_head_dim(),
        }
    }

    /// Whether heads of q and k are normalised.
    pub fn norms_heads(&self) -> bool {
        match self {
            Self::Heads(heads) => heads.head_norm.is_some(),
            Self::Latent(_) => true,
        }
    }

    /// Widths of what a cache keeps of a token.
    pub fn kept_widths(&self) -> Vec<usize> {
        match self {
            Self::Heads(heads) => vec![heads.attention.kv_heads * heads.attention.head_dim; 2],
            Self::Latent(latent) => std::iter::once(latent.kept_width())
                .chain(latent.indexer.iter().map(|indexer| indexer.head_dim))
                .collect(),
        }
    }
}

/// Attention whose keys and values are projections of the stream.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadsSpec {
    /// Its heads, and which keys a query sees.
    pub attention: AttentionSpec,
    /// Which projections have a bias.
    pub bias: AttentionBias,
    /// Whether q, k and v are one matrix.
    pub fused: bool,
    /// How each head of q and k is normalised.
    pub head_norm: Option<HeadNorm>,
    /// Which of [`DecoderSpec::ropes`] turns q and k.
    pub rope: Option<usize>,
    /// Whether each head has a logit of its own beside its keys'.
    pub sinks: bool,
    /// A factor on the queries that grows with their position.
    pub temperature: Option<Temperature>,
}

/// Attention whose keys and values are projections of a short row that stands for them, in training and in the cache alike (DeepSeek-AI,
/// "DeepSeek-V2", 2024).
#[derive(Clone, Debug, PartialEq)]
pub struct LatentSpec {
    /// Heads of queries, keys and values.
    pub heads: usize,
    /// Width of the row that queries are projections of; none where they are projections of the stream.
    pub q_lora_rank: Option<usize>,
    /// Width of the row that keys and values are projections of.
    pub kv_lora_rank: usize,
    /// Columns of a head of q and k that do not turn.
    pub qk_nope_head_dim: usize,
    /// Columns of a head of q that turn, behind those; all heads share the ones of k.
    pub qk_rope_head_dim: usize,
    /// Columns of a head of v.
    pub v_head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Whether the projections from and to the stream have a bias.
    pub bias: bool,
    /// The norms of the short rows.
    pub norm: RmsNorm,
    /// Which of [`DecoderSpec::ropes`] turns q, and which turns the shared columns of k.
    pub ropes: [usize; 2],
    /// What picks the keys that a query sees; none where it sees all.
    pub indexer: Option<IndexerSpec>,
}

/// What picks the keys that a query sees, by scores of its own (DeepSeek-AI, "DeepSeek-V3.2", 2025). No gradient flows through it.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexerSpec {
    /// Heads of its queries; its keys have one.
    pub heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Keys that a query sees at most.
    pub top_k: usize,
    /// Which of [`DecoderSpec::ropes`] turns its queries and keys.
    pub rope: usize,
}

impl LatentSpec {
    /// Columns of a head of q and k.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Columns that the cache keeps of a token, beside what the indexer keeps.
    pub fn kept_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionBias {
    /// q, k and v.
    pub qkv: bool,
    /// The output projection.
    pub output: bool,
}

/// How the heads of q and k are normalised, each for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeadNorm {
    /// By the root mean square, with a weight that all heads share.
    Rms(RmsNorm),
    /// By the root mean square, without a weight.
    Unit {
        /// Added to the mean square.
        eps: f64,
    },
    /// By mean and variance, with a weight for each head.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

/// `1 + scale * ln(1 + floor((position + 1) / floor))`: what queries far into a row are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Positions that share a factor.
    pub floor: f64,
    /// Factor on the logarithm.
    pub scale: f64,
}

impl Temperature {
    /// The factor at a position.
    pub fn at(&self, position: u32) -> f32 {
        (1.0 + self.scale * ((f64::from(position) + 1.0) / self.floor).floor().ln_1p()) as f32
    }
}

/// What a token goes through alone.
#[derive(Clone, Debug, PartialEq)]
pub enum MlpSpec {
    /// A gated MLP.
    Gated(GatedSpec),
    /// Several of them, of which a router picks some for each token.
    Experts(ExpertsSpec),
}

/// A gated MLP: `down(act(gate(x)) * up(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedSpec {
    /// Width inside.
    pub intermediate_size: usize,
    /// Whether the projections have a bias.
    pub bias: bool,
    /// Whether gate and up are one matrix.
    pub fused: bool,
    /// What the gate goes through.
    pub activation: Activation,
}

/// Experts and their router.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsSpec {
    /// How experts are picked and weighted.
    pub router: RouterSpec,
    /// What else bears on the picking.
    pub router_bias: RouterBias,
    /// Each expert; gate and up are one matrix.
    pub expert: GatedSpec,
    /// Whether weights multiply what experts read, instead of what they return.
    pub scale_input: bool,
    /// An MLP that every token goes through beside them.
    pub shared: Option<GatedSpec>,
}

impl ExpertsSpec {
    /// Columns of all MLPs that a token goes through.
    pub fn width(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, |shared| shared.intermediate_size);
        self.router.top_k * self.expert.intermediate_size + shared
    }
}

/// A vector with a number for each expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterBias {
    /// None.
    Absent,
    /// Added to the router's products.
    Logits,
    /// Added to the scores where experts are picked, not to their weights. No gradient reaches it.
    Selection,
}
