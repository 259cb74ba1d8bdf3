//! The one decoder all families share.

mod checkpointing;
mod experts;
mod gated;
mod heads;
mod indexer;
mod latent;
mod layer;
mod norm;
mod one_token;
mod parts;
mod pass;

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use pmetal_ops::{Arena, LinearMember, Value, Weight, decoding::Decoding, embedding, gather_rows, no_grad, scaled};

pub use self::{checkpointing::Checkpointing, one_token::OneToken};
use self::{
    layer::Layer,
    norm::Norm,
    one_token::{Model, lying, plain_layers},
    parts::Named,
    pass::{CacheUse, Pass, Ropes},
};
use crate::{
    CausalLMModel, DecoderSpec, Error, Input, KvCache, Result,
    names::{EMBEDDING, HEAD, NORM, stays_f32},
    weights::{WeightSource, fetch},
};

/// A decoder, as its spec says.
pub(crate) struct Decoder {
    spec: DecoderSpec,
    embedding: Weight,
    /// Shared with the recorded graph where layers run again in backward.
    layers: Vec<Arc<Layer>>,
    ropes: Ropes,
    norm: Norm,
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
        Self::of(spec, &mut |name, shape| fetch(source, trainable, name, &shape), dtype, device)
    }

    /// A decoder without numbers: its weights have names and shapes only.
    pub(crate) fn hollow(spec: DecoderSpec) -> Result<Self> {
        let nothing = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        let mut get = |_: &str, shape: Shape| Ok(Weight::Frozen(nothing.broadcast_as(shape)?));
        Self::of(spec, &mut get, DType::F32, &Device::Cpu)
    }

    fn of(
        spec: DecoderSpec,
        get: &mut dyn FnMut(&str, Shape) -> Result<Weight>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let table = (spec.vocab_size, spec.hidden_size);
        let embedding = get(EMBEDDING, table.into())?;
        // a table that is only looked up stays where it is
        let embedding = if spec.tie_word_embeddings { embedding.packed()? } else { embedding };
        let layers = (0..spec.num_hidden_layers()).map(|index| Ok(Arc::new(Layer::new(&spec, index, get)?)));
        let layers = layers.collect::<Result<_>>()?;
        let name = format!("{NORM}.weight");
        let weight = Named { weight: get(&name, spec.hidden_size.into())?, name };
        let norm = Norm { weight, spec: spec.norm, spare: 0 };
        let head = if spec.tie_word_embeddings { None } else { Some(get(HEAD, table.into())?.packed()?) };
        let ropes = Ropes::new(&spec.ropes);
        Ok(Self { spec, embedding, layers, ropes, norm, head, dtype, device: device.clone() })
    }

    /// From ids through all layers to the last norm, and the products of the routers.
    fn run(&self, input: &Input, pass: &Pass, cache: CacheUse) -> Result<(Value, Vec<Value>)> {
        let embedded = self.embedded(input.ids)?;
        let checkpointing = input.checkpointing.filter(|_| cache.is_none());
        let policy = |i| checkpointing.and_then(|checkpointing| checkpointing.policy(i, self.layers.len()));
        let first = self.norm_before(0);
        let (mut stream, mut normed) = match policy(0) {
            Some(_) => (embedded.clone(), no_grad(|| first.of(&embedded))?.1),
            None => first.of(&embedded)?,
        };
        drop(embedded);
        let mut routers = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let next = self.norm_before(i + 1);
            let again = policy(i);
            let (sum, its_norm, router) = match again {
                Some(policy) => layer.checkpointed(policy, &stream, normed, next, pass)?,
                None => layer.forward(&stream, &normed, &next, pass, cache)?,
            };
            (stream, normed) = (sum, its_norm);
            routers.extend(router);
            // what runs again forms the norm before it itself; to anything else a gradient flows through it
            if again.is_some() && checkpointing.is_some_and(|c| c.policy(i + 1, self.layers.len()).is_none()) {
                (stream, normed) = self.norm_before(i + 1).of(&stream)?;
            }
        }
        Ok((normed, routers))
    }

    /// A pass of rows some of which turn otherwise now that they are longer, so that nothing of what the cache holds of them is right: those are read
    /// from their start. Returns what new tokens lead to.
    fn read_anew(&self, input: &Input, cache: &mut KvCache, held: &[usize]) -> Result<(Value, Vec<Value>)> {
        let (mut ids, mut q_lens, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        let mut rest = input.ids;
        for (row, (&before, &more)) in held.iter().zip(input.q_lens).enumerate() {
            let (new, behind) = rest.split_at(more.min(rest.len()));
            rest = behind;
            let again = self.ropes.turn_anew(before, before + more);
            if again {
                ids.extend_from_slice(cache.ids(row));
                cache.truncate(row, 0);
            }
            let old = if again { before } else { 0 };
            kept.extend((ids.len()..ids.len() + more).map(|place| place as u32));
            ids.extend_from_slice(new);
            q_lens.push(old + more);
        }
        let (hidden, _) = self.forward_with_routers(&Input { ids: &ids, q_lens: &q_lens, ..*input }, Some(cache))?;
        Ok((no_grad(|| gather_rows(&hidden, &kept))?, Vec::new()))
    }

    /// The embedding's rows, `[tokens, hidden]`.
    fn embedded(&self, ids: &[u32]) -> Result<Value> {
        let rows = embedding(ids, &self.embedding, self.dtype, &self.device)?;
        let factor = self.spec.embedding_multiplier;
        if factor == 1.0 {
            return Ok(rows);
        }
        // the factor is a number of the model's dtype
        let factor = Tensor::new(factor, &Device::Cpu)?.to_dtype(self.dtype)?.to_dtype(DType::F64)?.to_scalar()?;
        Ok(scaled(&rows, factor)?)
    }

    /// The norm in front of layer `index`, or behind the last.
    fn norm_before(&self, index: usize) -> Norm {
        self.layers.get(index).map_or_else(|| self.norm.clone(), |layer| layer.input_norm())
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

    fn forward_with_routers(&self, input: &Input, cache: Option<&mut KvCache>) -> Result<(Value, Vec<Value>)> {
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
            return self.run(input, &self.ropes.pass(input), None);
        };
        let lens = cache.lens_with(input.q_lens)?;
        let held = cache.lens().to_vec();
        if held.iter().zip(&lens).any(|(&before, &len)| self.ropes.turn_anew(before, len)) {
            return self.read_anew(input, cache, &held);
        }
        let pass = self.ropes.pass_behind(input, &lens, cache.capacity());
        let results = no_grad(|| self.run(input, &pass, Some((cache, input.q_lens))))?;
        cache.advance(input.ids, input.q_lens);
        Ok(results)
    }

    fn one_token(&self, cache: &KvCache) -> Result<Option<OneToken>> {
        let (Some(kind), [_]) = (plain_layers(&self.spec), cache.lens()) else { return Ok(None) };
        let attention = kind.attention;
        let widths = [self.spec.hidden_size, attention.heads * attention.head_dim, kind.intermediate_size];
        let Some(kernels) = Decoding::on(&self.device, self.dtype, &attention, &widths)? else {
            return Ok(None);
        };
        let rows = |index: usize, layer: &Layer| match cache.layer(index)? {
            [keys, values] => layer.rows(self.dtype, [keys.clone(), values.clone()]),
            _ => Ok(None),
        };
        let layers = self.layers.iter().enumerate().map(|(index, layer)| rows(index, layer));
        let Some(layers) = layers.collect::<Result<Option<Vec<_>>>>()? else { return Ok(None) };
        let [embedding, norm, head] =
            [self.embedding(), &self.norm.weight.weight, self.head()].map(|weight| lying(weight, self.dtype));
        let (Some(embedding), Some(norm), Some(head)) = (embedding, norm, head) else { return Ok(None) };
        let inv_freq = Tensor::new(&*kind.inv_freq, &self.device)?;
        let model = Model { embedding, layers, norm, head, eps: kind.eps, attention, inv_freq };
        OneToken::new(kernels, model).map(Some)
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
        self.layers.iter().for_each(|layer| layer.named_weights(&mut weights));
        weights.push(self.norm.weight.pair());
        weights.extend(self.head.iter().map(|head| (HEAD.to_owned(), head.clone())));
        weights
    }
}

/// Every tensor of a decoder, with its shape, from the embedding to the head (which a tied decoder has none of).
///
/// # Errors
/// Where the spec's numbers do not fit one another.
pub fn tensors_of(spec: &DecoderSpec) -> Result<Vec<(String, Shape)>> {
    let weights = Decoder::hollow(spec.clone())?.named_weights().into_iter();
    Ok(weights.map(|(name, weight)| (name, weight.shape().clone())).collect())
}

/// Those of [`tensors_of`] that can be trained.
///
/// # Errors
/// As for [`tensors_of`].
pub fn parameters_of(spec: &DecoderSpec) -> Result<Vec<(String, Shape)>> {
    Ok(tensors_of(spec)?.into_iter().filter(|(name, _)| !stays_f32(name)).collect())
}

/// Every linear layer of a decoder's attention and MLPs: its module's name, `[out, in]` of its weight.
///
/// # Errors
/// As for [`tensors_of`].
pub fn linear_layers(spec: &DecoderSpec) -> Result<Vec<(String, [usize; 2])>> {
    let (mut decoder, mut layers) = (Decoder::hollow(spec.clone())?, Vec::new());
    decoder.for_each_linear(&mut |module, member| {
        layers.push((module.to_owned(), [member.out_features(), member.in_features()]));
    })?;
    Ok(layers)
}
