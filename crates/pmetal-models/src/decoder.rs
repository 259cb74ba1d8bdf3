//! The one decoder all families share.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use pmetal_ops::{
    Arena, LinearMember, RmsNorm, RopeAngles, RopeLayout, Rows, Value, Weight, decoding::Decoding, embedding, no_grad,
};

use crate::{
    CausalLMModel, DecoderSpec, Error, Input, KvCache, Result,
    layer::{CacheUse, Layer, Norm, Pass},
    names::{EMBEDDING, HEAD, NORM},
    one_token::{Model, OneToken, lying},
    weights::{WeightSource, fetch},
};

/// A Llama-like decoder, as its spec says.
pub(crate) struct Decoder {
    spec: DecoderSpec,
    embedding: Weight,
    /// Shared with the recorded graph where layers run again in backward.
    layers: Vec<Arc<Layer>>,
    angles: RopeAngles,
    norm: Weight,
    /// None where the head is the embedding.
    head: Option<Weight>,
    dtype: DType,
    device: Device,
}

impl Decoder {
    /// A decoder of the weights in `source`; those `trainable` has a place for are copied there.
    pub(crate) fn new(
        spec: DecoderSpec,
        source: &dyn WeightSource,
        trainable: Option<&Arena>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut get = |name: String, shape| fetch(source, trainable, &name, &shape);
        let table = (spec.vocab_size, spec.hidden_size);
        let embedding = get(EMBEDDING.to_owned(), table.into())?;
        // a table that is only looked up stays where it is
        let embedding = if spec.tie_word_embeddings { embedding.packed()? } else { embedding };
        let layers = (0..spec.num_hidden_layers).map(|index| Ok(Arc::new(Layer::new(&spec, index, &mut get)?)));
        let layers = layers.collect::<Result<_>>()?;
        let norm = get(NORM.to_owned(), spec.hidden_size.into())?;
        let head = if spec.tie_word_embeddings { None } else { Some(get(HEAD.to_owned(), table.into())?.packed()?) };
        let angles =
            RopeAngles::new(&spec.rope.inv_freq(0), spec.rope.attention_factor, RopeLayout::whole(spec.head_dim));
        Ok(Self { spec, embedding, layers, angles, norm, head, dtype, device: device.clone() })
    }

    /// The pass of rows that start at `starts`.
    fn pass(&self, input: &Input, starts: &[usize], rows: Rows) -> Pass {
        let positions: Vec<u32> =
            starts.iter().zip(input.q_lens).flat_map(|(&start, &len)| (start..start + len).map(|p| p as u32)).collect();
        Pass { table: self.angles.of(&positions), rows, noise: input.noise }
    }

    /// From ids through all layers to the last norm.
    fn run(&self, input: &Input, pass: &Pass, cache: CacheUse) -> Result<Value> {
        let embedded = embedding(input.ids, &self.embedding, self.dtype, &self.device)?;
        let checkpointing = input.checkpointing.filter(|_| cache.is_none());
        let policy = |i| checkpointing.and_then(|checkpointing| checkpointing.policy(i, self.layers.len()));
        let first = self.norm_before(0);
        let (mut stream, mut normed) = match policy(0) {
            Some(_) => (embedded.clone(), no_grad(|| first.of(&embedded))?.1),
            None => first.of(&embedded)?,
        };
        drop(embedded);
        for (i, layer) in self.layers.iter().enumerate() {
            let next = self.norm_before(i + 1);
            let Some(policy) = policy(i) else {
                (stream, normed) = layer.forward(&stream, &normed, &next, pass, cache)?;
                continue;
            };
            (stream, normed) = layer.checkpointed(policy, &stream, normed, next, pass)?;
            // what runs again forms the norm before it itself; to anything else a gradient flows through it
            if checkpointing.is_some_and(|c| c.policy(i + 1, self.layers.len()).is_none()) {
                (stream, normed) = self.norm_before(i + 1).of(&stream)?;
            }
        }
        Ok(normed)
    }

    /// The norm in front of layer `index`, or behind the last.
    fn norm_before(&self, index: usize) -> Norm {
        let last = || Norm { weight: self.norm.clone(), norm: RmsNorm::new(self.spec.rms_norm_eps), spare: 0 };
        self.layers.get(index).map_or_else(last, |layer| layer.input_norm())
    }
}

impl CausalLMModel for Decoder {
    fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> Device {
        self.device.clone()
    }

    fn forward(&self, input: &Input, cache: Option<&mut KvCache>) -> Result<Value> {
        let tokens: usize = input.q_lens.iter().sum();
        if tokens != input.ids.len() || tokens == 0 {
            let reason = format!("rows of {tokens} tokens in all, {} ids", input.ids.len());
            return Err(Error::Input { reason });
        }
        if let Some(id) = input.ids.iter().find(|&&id| id as usize >= self.spec.vocab_size) {
            let last = self.spec.vocab_size.saturating_sub(1);
            let reason = format!("token id {id}, the model knows 0 to {last}; is the tokenizer of another model?");
            return Err(Error::Input { reason });
        }
        let Some(cache) = cache else {
            let pass = self.pass(input, &vec![0; input.q_lens.len()], Rows::packed(input.q_lens));
            return self.run(input, &pass, None);
        };
        let lens = cache.lens_with(input.q_lens)?;
        let pass = self.pass(input, cache.lens(), Rows::cached(input.q_lens, &lens, cache.capacity()));
        let hidden = no_grad(|| self.run(input, &pass, Some((cache, input.q_lens))))?;
        cache.advance(lens);
        Ok(hidden)
    }

    fn one_token(&self, cache: &KvCache) -> Result<Option<OneToken>> {
        let spec = &self.spec;
        let widths = [spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.intermediate_size];
        let ([_], Some(first)) = (cache.lens(), self.layers.first()) else { return Ok(None) };
        let Some(kernels) = Decoding::on(&self.device, self.dtype, first.attention(), &widths)? else {
            return Ok(None);
        };
        let layers = self.layers.iter().zip(cache.layers());
        let layers = layers.map(|(layer, cache)| layer.rows(self.dtype, cache.clone()));
        let Some(layers) = layers.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
        let [embedding, norm, head] =
            [self.embedding(), &self.norm, self.head()].map(|weight| lying(weight, self.dtype));
        let (Some(embedding), Some(norm), Some(head)) = (embedding, norm, head) else { return Ok(None) };
        let inv_freq = Tensor::new(&*spec.rope.inv_freq(0), &self.device)?;
        let (eps, attention) = (spec.rms_norm_eps as f32, *first.attention());
        OneToken::new(kernels, Model { embedding, layers, norm, head, eps, attention, inv_freq }).map(Some)
    }

    fn embedding(&self) -> &Weight {
        &self.embedding
    }

    fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    fn set_tables(&mut self, embedding: Weight, head: Option<Weight>) -> Result<()> {
        let (rows, width) = embedding.shape().dims2()?;
        let head_dims = head.as_ref().map_or(embedding.shape(), Weight::shape).dims();
        if width != self.spec.hidden_size || head_dims != [rows, width] {
            let (hidden, dims) = (self.spec.hidden_size, embedding.shape().dims());
            let reason =
                format!("embedding {dims:?} and head {head_dims:?}, expected rows of {hidden} and as many of each");
            return Err(Error::Input { reason });
        }
        self.spec.vocab_size = rows;
        self.spec.tie_word_embeddings = head.is_none();
        (self.embedding, self.head) = (embedding, head);
        Ok(())
    }

    fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| Arc::make_mut(layer).for_each_linear(f))
    }

    fn named_weights(&self) -> Vec<(String, Weight)> {
        let mut weights = vec![(EMBEDDING.to_owned(), self.embedding.clone())];
        weights.extend(self.layers.iter().flat_map(|layer| layer.named_weights()));
        weights.push((NORM.to_owned(), self.norm.clone()));
        weights.extend(self.head.iter().map(|head| (HEAD.to_owned(), head.clone())));
        weights
    }
}
