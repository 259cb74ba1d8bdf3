use candle_core::{DType, Device, Tensor};
use pmetal_ops::{LinearMember, LogitsSpec, Value, Weight, logits};

use crate::{Checkpointing, DecoderSpec, KvCache, OneToken, Result};

/// What a forward reads: token ids of several rows behind one another, without padding.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The ids of all rows.
    pub ids: &'a [u32],
    /// Tokens of each row. Positions start at 0 in each, or behind what the cache holds of it.
    pub q_lens: &'a [usize],
    /// The seed of dropout, in training.
    pub noise: Option<u64>,
    /// Whether layers run again in backward instead of keeping what they computed.
    pub checkpointing: Option<Checkpointing>,
}

impl<'a> Input<'a> {
    /// Rows without dropout and without checkpointing.
    pub fn rows(ids: &'a [u32], q_lens: &'a [usize]) -> Self {
        Self { ids, q_lens, noise: None, checkpointing: None }
    }
}

/// A causal language model.
pub trait CausalLMModel: Send {
    /// What it is made of.
    fn spec(&self) -> &DecoderSpec;

    /// The dtype of its activations.
    fn dtype(&self) -> DType;

    /// Where it computes.
    fn device(&self) -> Device;

    /// The hidden states behind the last norm, `[tokens, hidden_size]` in the model's dtype.
    ///
    /// With a cache the rows continue where it stands, their keys and values are added to it, and no gradient is recorded.
    ///
    /// # Errors
    /// Where lengths do not add up, an id is outside the vocabulary, or the cache is full.
    fn forward(&self, input: &Input, cache: Option<&mut KvCache>) -> Result<Value> {
        Ok(self.forward_with_routers(input, cache)?.0)
    }

    /// [`CausalLMModel::forward`], and what the router of each layer with experts computed, `[tokens, experts]`: what a loss that balances experts
    /// is made of.
    ///
    /// # Errors
    /// As for [`CausalLMModel::forward`].
    fn forward_with_routers(&self, input: &Input, cache: Option<&mut KvCache>) -> Result<(Value, Vec<Value>)>;

    /// A way to read one token after another of the only row of `cache`, as fast as the device can; none where [`CausalLMModel::forward`] is
    /// that. It holds for these weights and this cache, as long as neither changes.
    ///
    /// # Errors
    /// Where the device fails.
    fn one_token(&self, _cache: &KvCache) -> Result<Option<OneToken>> {
        Ok(None)
    }

    /// The embedding, `[vocab_size, hidden_size]`.
    fn embedding(&self) -> &Weight;

    /// The head, `[vocab_size, hidden_size]`: the embedding where they are tied.
    fn head(&self) -> &Weight;

    /// Puts another embedding and another head in place of the model's, both `[n, hidden_size]`; without a head, the embedding is the
    /// head too. The spec's `vocab_size` and `tie_word_embeddings` follow.
    ///
    /// # Errors
    /// Where they are not of such shapes.
    fn set_tables(&mut self, embedding: Weight, head: Option<Weight>) -> Result<()>;

    /// Visits every linear layer of attention and MLP under its module name, `model.layers.0.self_attn.q_proj` and so on, to change it.
    ///
    /// # Errors
    /// Where the changed layers find no place on the device.
    fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()>;

    /// Every weight under its Hugging Face name, in the order of [`crate::tensors_of`].
    fn named_weights(&self) -> Vec<(String, Weight)>;

    /// What becomes of the head's products.
    fn logits_spec(&self) -> LogitsSpec {
        self.spec().logits
    }

    /// The logits of `hidden [n, hidden_size]`, `[n, vocab_size]` f32.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(logits(hidden, self.head(), self.logits_spec())?)
    }
}
