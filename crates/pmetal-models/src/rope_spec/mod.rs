//! How fast each pair of a head turns.
//!
//! Plain rope turns pair `i` of `d / 2` by `theta^(-2i/d)` per position. Scaled kinds change these frequencies, most of them once; those of
//! two kinds depend on how long the row is. Sources: Su et al., "RoFormer", 2021; the formulas of the scaled kinds are in `scaling`.

mod change;
mod scaling;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

pub use change::override_rope_scaling;
pub(crate) use scaling::Llama3;

use crate::{Result, keys::Keys};

/// The kinds of scaling there are, as `rope_type` names them.
pub const ROPE_SCALING_KINDS: [&str; 6] = ["default", "dynamic", "linear", "llama3", "longrope", "yarn"];

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// The base of the frequencies.
    pub theta: f64,
    /// Columns of each head that turn; even.
    pub rotary_dim: usize,
    /// Multiplies cosines and sines, so scores get its square.
    pub attention_factor: f32,
    /// `mscale(factor, mscale_all_dim)²`, by which latent attention multiplies its scores and no other does; 1 where the settings name none.
    pub softmax_factor: f64,
    /// Radians per position of each pair.
    pub frequencies: Frequencies,
}

/// Radians per position of each pair, `rotary_dim / 2` of them.
#[derive(Clone, Debug, PartialEq)]
pub enum Frequencies {
    /// The same for rows of any length.
    Fixed(Vec<f32>),
    /// Of the length of the row.
    ByLength(ByLength),
}

/// Frequencies that depend on how many tokens a row has.
#[derive(Clone, Debug, PartialEq)]
pub enum ByLength {
    /// The base grows with a row that is longer than `context`.
    Dynamic {
        /// How many times `context` the model is to reach.
        factor: f64,
        /// Tokens that plain frequencies serve.
        context: usize,
        /// The divisor of exponents: `rotary_dim`, or one less.
        dim: usize,
    },
    /// Two lists: one for rows of up to `original` tokens, one for all positions of longer ones.
    LongRope {
        /// Tokens of the longest row that takes the short list.
        original: usize,
        /// Of short rows.
        short: Vec<f32>,
        /// Of long rows.
        long: Vec<f32>,
    },
}

/// What a family means where its settings are silent.
#[derive(Clone, Copy)]
pub(crate) struct RopeDefaults {
    /// The base.
    pub(crate) theta: f64,
    /// Whether `partial_rotary_factor` acts on unscaled rope too.
    pub(crate) partial: bool,
    /// Whether the kind `yarn` is an old name of `longrope`.
    pub(crate) yarn_is_longrope: bool,
}

impl Default for RopeDefaults {
    fn default() -> Self {
        Self { theta: 10_000.0, partial: false, yarn_is_longrope: false }
    }
}

impl RopeSpec {
    /// Reads the keys of today (`rope_parameters`) and of earlier files (`rope_theta` and `rope_scaling`, whose kind is `type` or
    /// `rope_type`). As in transformers, a filled `rope_scaling` replaces `rope_parameters`, and a theta inside beats the one outside.
    pub(crate) fn read(config: &Keys, defaults: RopeDefaults, head_dim: usize, max_positions: usize) -> Result<Self> {
        let scaling = match config.object("rope_scaling")?.filter(|scaling| !scaling.is_empty()) {
            Some(scaling) => Some(scaling),
            None => config.object("rope_parameters")?,
        };
        let theta = config.positive("rope_theta")?.unwrap_or(defaults.theta);
        Self::read_from(scaling.as_ref(), config, RopeDefaults { theta, ..defaults }, head_dim, max_positions)
    }

    /// The same from the settings object `scaling`, as where layers have their own: the base is the one it names, or that of `defaults`,
    /// not `rope_theta` of `config`.
    pub(crate) fn read_from(
        scaling: Option<&Keys>,
        config: &Keys,
        defaults: RopeDefaults,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self> {
        scaling::read(scaling.copied(), config, defaults, head_dim, max_positions)
    }

    /// Radians per position of each pair in a row of `row_len` tokens, `rotary_dim / 2` of them.
    pub fn inv_freq(&self, row_len: usize) -> Cow<'_, [f32]> {
        match &self.frequencies {
            Frequencies::Fixed(inv_freq) => inv_freq.into(),
            Frequencies::ByLength(ByLength::LongRope { original, short, long }) => {
                if row_len > *original { long } else { short }.into()
            }
            Frequencies::ByLength(ByLength::Dynamic { factor, context, dim }) => {
                scaling::plain(scaling::grown(self.theta, *factor, row_len, *context, *dim), *dim).into()
            }
        }
    }

    /// Whether rows of different lengths turn differently.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.frequencies, Frequencies::ByLength(_))
    }

    /// Tokens of the longest row that a model of `max_positions` positions is for: more where frequencies grow with the row.
    pub fn context(&self, max_positions: usize) -> usize {
        match &self.frequencies {
            Frequencies::ByLength(ByLength::Dynamic { factor, .. }) => {
                (max_positions as f64 * factor.max(1.0)) as usize
            }
            _ => max_positions,
        }
    }
}
