use crate::RopeSpec;

/// A decoder as numbers and choices: everything a family's `config.json` decides.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The family, as `model_type` in `config.json`.
    pub model_type: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside an MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even; apart from `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Added to the mean square inside every norm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// Which projections of attention have a bias.
    pub attention_bias: AttentionBias,
    /// Whether the MLP's three projections have a bias.
    pub mlp_bias: bool,
    /// Whether each head of q and k is normalised before it is rotated.
    pub qk_norm: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionBias {
    /// q, k and v.
    pub qkv: bool,
    /// The output projection.
    pub output: bool,
}
