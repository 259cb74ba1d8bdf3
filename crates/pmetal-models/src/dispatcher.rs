use std::borrow::Cow;

use candle_core::{DType, Device};
use pmetal_ops::Arena;
use serde_json::Value;

use crate::{
    CausalLMModel, Checkpoint, DecoderSpec, Error, NormSpec, Result,
    decoder::{Decoder, tensors_of},
    keys::Keys,
    known_architectures,
    registry::{FAMILIES, Family, Holder},
    weights::{FromCheckpoint, FromSeed},
};

/// The family of a configuration: by `model_type`, or where that is absent by its class in `architectures`.
pub(crate) fn family_of(config: &Value) -> Result<&'static Family> {
    let keys = Keys::new(config);
    let (model_type, classes) = (keys.text("model_type")?, keys.texts("architectures")?.unwrap_or_default());
    let found = FAMILIES.iter().find(|family| match model_type {
        Some(model_type) => {
            family.model_type == model_type || family.holder.is_some_and(|holder| holder.model_type == model_type)
        }
        None => classes.contains(&family.architecture),
    });
    found.ok_or_else(|| Error::UnknownArchitecture {
        path: "config.json".into(),
        name: model_type.or(classes.first().copied()).unwrap_or("(no model_type)").to_owned(),
        known: known_architectures(),
    })
}

/// The configuration of the text part of a model that has others beside it; any other as it is.
///
/// # Errors
/// Where `text_config` is no object.
pub fn text_config(config: &Value) -> Result<Cow<'_, Value>> {
    if Keys::new(config).object("text_config")?.is_none() {
        return Ok(Cow::Borrowed(config));
    }
    let mut text = config["text_config"].clone();
    for key in OF_THE_WHOLE {
        if text.get(key).is_none()
            && let Some(value) = config.get(key)
        {
            text[key] = value.clone();
        }
    }
    if let Some((family, _)) = holder(config) {
        text["model_type"] = family.model_type.into();
    }
    Ok(Cow::Owned(text))
}

/// What holds the text part that a configuration describes beside others, and the family of that part.
pub(crate) fn holder(config: &Value) -> Option<(&'static Family, Holder)> {
    let is_held = |family: &&Family| family.holder.is_some_and(|holder| config["model_type"] == holder.model_type);
    FAMILIES.iter().find(is_held).and_then(|family| Some((family, family.holder?)))
}

/// Keys that stand beside `text_config` and hold for the text part too.
const OF_THE_WHOLE: [&str; 8] = [
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "initializer_range",
];

/// More parameters than any model has, and so few that sums and products of them do not overflow.
const LARGEST_MODEL: u128 = 1 << 48;

/// What a `config.json` describes: of a model with several parts, the text part.
///
/// # Errors
/// Where the family is not known, a key is missing or impossible, or it asks for something that is not supported.
pub fn spec_of(config: &Value) -> Result<DecoderSpec> {
    let config = text_config(config)?;
    let family = family_of(&config)?;
    let keys = Keys::new(&config);
    let spec = DecoderSpec { model_type: family.model_type.to_owned(), ..(family.spec)(&keys)? };
    if spec.rough_parameters() > LARGEST_MODEL {
        return Err(
            keys.wrong("hidden_size", format!("with the other sizes that is more than {LARGEST_MODEL} parameters"))
        );
    }
    Ok(spec)
}

/// Loads a model.
///
/// `dtype` is that of the activations. Weights stored as bf16 or f16 stay as they are, on the CPU where they lie in the file; others
/// become `dtype`, one at a time. A weight whose name `trainable` has is copied there and trained.
pub fn load(
    checkpoint: &Checkpoint,
    dtype: DType,
    device: &Device,
    trainable: Option<&Arena>,
) -> Result<Box<dyn CausalLMModel>> {
    let source = FromCheckpoint { checkpoint, dtype, device };
    let decoder = Decoder::new(checkpoint.spec().clone(), &source, trainable, dtype, device)?;
    tracing::debug!(dtype = dtype.as_str(), ?device, "weights are ready");
    Ok(Box::new(decoder))
}

/// A model of fresh weights: normal around zero with the configuration's `initializer_range`, norms one, biases zero. Each value is a
/// function of the seed, its tensor's name and its place.
pub fn random(
    config: &Value,
    dtype: DType,
    device: &Device,
    seed: u64,
    trainable: Option<&Arena>,
) -> Result<Box<dyn CausalLMModel>> {
    let spec = spec_of(config)?;
    refuse_too_large(&spec, dtype)?;
    // a norm that adds to its weights starts as one that multiplies by one
    let norm = match spec.norm {
        NormSpec::Rms(norm) => 1.0 - norm.weight_offset,
        NormSpec::Layer { .. } => 1.0,
    };
    let source = FromSeed { seed, std: spec.initializer_range, norm, dtype, device };
    Ok(Box::new(Decoder::new(spec, &source, trainable, dtype, device)?))
}

/// Refuses to make weights that this machine has no memory for: a slip in a size would take all of it before anyone is told.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn refuse_too_large(spec: &DecoderSpec, dtype: DType) -> Result<()> {
    let count = |shape: &candle_core::Shape| shape.dims().iter().map(|&n| n as u128).product::<u128>();
    let parameters: u128 = tensors_of(spec)?.iter().map(|(_, shape)| count(shape)).sum();
    let needed = parameters * dtype.size_in_bytes() as u128;
    match pmetal_core::total_memory() {
        Some(memory) if needed > u128::from(memory) => Err(Error::TooLarge { parameters, needed, memory }),
        _ => Ok(()),
    }
}
