//! The one decoder all families share.

use std::sync::Arc;

use candle_core::{DType, Device};
use pmetal_ops::{
    Arena, LinearMember, Policy, RopeTable, Rows, Value, Weight, checkpoint, embedding, no_grad, rms_norm,
};

use crate::{
    CausalLMModel, DecoderSpec, Error, Input, KvCache, Result,
    layer::{CacheUse, Layer, Pass},
    names::{EMBEDDING, HEAD, NORM},
    weights::{WeightSource, fetch},
};

/// A Llama-like decoder, as its spec says.
pub(crate) struct Decoder {
    spec: DecoderSpec,
    embedding: Weight,
    /// Shared with the recorded graph where layers run again in backward.
    layers: Vec<Arc<Layer>>,
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
        Ok(Self { spec, embedding, layers, norm, head, dtype, device: device.clone() })
    }

    /// The pass of rows that start at `starts`.
    fn pass(&self, input: &Input, starts: &[usize], rows: Rows) -> Pass {
        let positions: Vec<u32> =
            starts.iter().zip(input.q_lens).flat_map(|(&start, &len)| (start..start + len).map(|p| p as u32)).collect();
        Pass { table: RopeTable::new(&positions, &self.spec.rope.inv_freq, 1.0), rows, noise: input.noise }
    }

    /// From ids through all layers to the last norm.
    fn run(&self, input: &Input, pass: &Pass, cache: CacheUse) -> Result<Value> {
        let eps = self.spec.rms_norm_eps;
        let mut stream = embedding(input.ids, &self.embedding, self.dtype, &self.device)?;
        if let Some(policy) = input.checkpointing.filter(|_| cache.is_none()) {
            for i in 0..self.layers.len() {
                stream = self.checkpointed(i, &stream, pass, policy)?;
            }
            return Ok(rms_norm(&stream, &self.norm.value()?, eps)?);
        }
        let mut normed = rms_norm(&stream, &self.norm_before(0).value()?, eps)?;
        for (i, layer) in self.layers.iter().enumerate() {
            (stream, normed) = layer.forward(&stream, &normed, self.norm_before(i + 1), pass, cache)?;
        }
        Ok(normed)
    }

    /// A layer that keeps nothing but the stream before it: its norm is formed again inside, and the next layer's, which comes with
    /// the sum, is left to the next layer.
    fn checkpointed(&self, index: usize, stream: &Value, pass: &Pass, policy: Policy) -> Result<Value> {
        let (pass, next_norm, eps) = (pass.clone(), self.norm_before(index + 1).clone(), self.spec.rms_norm_eps);
        let layer = self.layers[index].clone();
        let outputs = checkpoint(policy, &[stream], move |inputs| {
            let normed = rms_norm(&inputs[0], &layer.input_norm().value()?, eps)?;
            let (stream, _) = layer.forward(&inputs[0], &normed, &next_norm, &pass, None).map_err(into_ops)?;
            Ok(vec![stream])
        })?;
        outputs.into_iter().next().ok_or_else(|| Error::Input { reason: "a layer returned nothing".into() })
    }

    /// The norm in front of layer `index`, or behind the last.
    fn norm_before(&self, index: usize) -> &Weight {
        self.layers.get(index).map_or(&self.norm, |layer| layer.input_norm())
    }
}

/// An error inside a function that [`checkpoint`] runs.
fn into_ops(error: Error) -> pmetal_ops::Error {
    match error {
        Error::Ops(error) => error,
        Error::Candle(error) => error.into(),
        other => candle_core::Error::Msg(other.to_string()).into(),
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

    fn for_each_linear(&mut self, f: &mut dyn FnMut(&str, &mut LinearMember)) {
        for layer in &mut self.layers {
            Arc::make_mut(layer).linears_mut().for_each(|(module, member)| f(module, member));
        }
    }

    fn named_weights(&self) -> Vec<(String, Weight)> {
        let mut weights = vec![(EMBEDDING.to_owned(), self.embedding.clone())];
        weights.extend(self.layers.iter().flat_map(|layer| layer.named_weights()));
        weights.push((NORM.to_owned(), self.norm.clone()));
        weights.extend(self.head.iter().map(|head| (HEAD.to_owned(), head.clone())));
        weights
    }
}
