//! A decoder's way through its layers for one new token behind those in a cache, where the device has kernels for that.
//!
//! Each layer is five steps, which are recorded once and asked for with every token: the token and its place stand in device memory.

use std::{borrow::Cow, fmt};

use candle_core::{DType, Tensor};
use pmetal_ops::{
    Activation, LinearGroup, LinearMember, LogitsSpec, RopeLayout, Weight,
    decoding::{AttentionSpec, Decoding, Recording, RowAttention, RowProduct, RowStep},
};

use crate::{AttentionKind, DecoderSpec, HeadNorm, MlpSpec, NormPlaces, NormSpec, Result};

/// What reads one token after another of the only row of a cache, as long as neither the cache grows nor the model changes.
pub struct OneToken {
    kernels: Decoding,
    recording: Recording,
    /// `[2]` u32: the token, its place.
    state: Tensor,
    rows: Rows,
    /// What the recording reads.
    model: Model,
}

/// A model as its tokens meet it.
pub(super) struct Model {
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<LayerRows>,
    pub(super) norm: Tensor,
    pub(super) head: Tensor,
    pub(super) eps: f32,
    pub(super) attention: AttentionSpec,
    /// `[head_dim / 2]` f32: the angle of each pair of a head at place 1.
    pub(super) inv_freq: Tensor,
}

/// Attention's two groups, and the norms of the heads of q and k.
pub(super) type HeadRows = ([Projections; 2], Option<[Tensor; 2]>);

/// A layer's weights, and its keys and values in the cache.
pub(super) struct LayerRows {
    block_norms: [Tensor; 2],
    head_norms: Option<[Tensor; 2]>,
    qkv: Projections,
    output: Projections,
    gate_up: Projections,
    down: Projections,
    cache: [Tensor; 2],
}

/// Projections of one row.
pub(super) struct Projections {
    weights: Vec<Tensor>,
    bias: Option<Tensor>,
}

impl Projections {
    /// Those of a group as they lie on the device; none where one has an adapter, or another dtype than the activations.
    pub(super) fn of(group: &LinearGroup, dtype: DType) -> Result<Option<Self>> {
        let members = group.members();
        if members.iter().any(|member| member.adapter.is_some()) {
            return Ok(None);
        }
        let weights = members.iter().map(|member| lying(&member.weight, dtype)).collect::<Option<Vec<_>>>();
        let Some(weights) = weights else { return Ok(None) };
        let bias = match members.iter().any(|member| member.bias.is_some()) {
            true => {
                Some(Tensor::cat(&members.iter().map(|m| bias_of(m, &weights[0])).collect::<Result<Vec<_>>>()?, 0)?)
            }
            false => None,
        };
        Ok(Some(Self { weights, bias }))
    }

    /// Gate and up apart, where they are one matrix: the kernels take the two.
    fn in_halves(mut self) -> Result<Self> {
        if let [joint] = self.weights.as_slice() {
            let inner = joint.dim(0)? / 2;
            self.weights = vec![joint.narrow(0, 0, inner)?, joint.narrow(0, inner, inner)?];
        }
        Ok(self)
    }

    fn inputs(&self) -> usize {
        self.weights.first().and_then(|weight| weight.dims().get(1).copied()).unwrap_or(0)
    }

    fn of_row<'a>(&'a self, x: &'a Tensor, y: &'a Tensor) -> RowProduct<'a> {
        RowProduct { bias: self.bias.as_ref(), ..plain(self.weights.iter().collect(), x, y) }
    }
}

/// A member's bias, zeros where it has none.
fn bias_of(member: &LinearMember, like: &Tensor) -> Result<Tensor> {
    Ok(match &member.bias {
        Some(bias) => bias.tensor()?.to_dtype(like.dtype())?,
        None => Tensor::zeros(member.out_features(), like.dtype(), like.device())?,
    })
}

/// A weight where it lies on its device; none where it is not there in `dtype`.
pub(super) fn lying(weight: &Weight, dtype: DType) -> Option<Tensor> {
    let tensor = match weight {
        Weight::Frozen(tensor) => tensor,
        Weight::Trainable(param) => param.value(),
        Weight::Mapped(_) | Weight::Packed(..) => return None,
    };
    (tensor.dtype() == dtype).then(|| tensor.clone())
}

/// The rows that steps hand on.
struct Rows {
    stream: Tensor,
    qkv: Tensor,
    attended: Tensor,
    gated: Tensor,
    logits: Tensor,
}

impl Rows {
    fn new(model: &Model) -> Result<Self> {
        let (device, dtype) = (model.norm.device(), model.norm.dtype());
        let AttentionSpec { heads, kv_heads, head_dim, .. } = model.attention;
        let row = |width: usize, dtype| Tensor::zeros((1, width), dtype, device);
        let inner = model.layers.first().map_or(0, |layer| layer.down.inputs());
        Ok(Self {
            stream: row(model.norm.elem_count(), dtype)?,
            qkv: row((heads + 2 * kv_heads) * head_dim, dtype)?,
            attended: row(heads * head_dim, dtype)?,
            gated: row(inner, dtype)?,
            logits: row(model.head.dim(0)?, DType::F32)?,
        })
    }
}

impl OneToken {
    pub(super) fn new(kernels: Decoding, model: Model) -> Result<Self> {
        let state = Tensor::zeros(2, DType::U32, model.norm.device())?;
        let rows = Rows::new(&model)?;
        let position = state.narrow(0, 1, 1)?;
        let mut steps = Vec::with_capacity(5 * model.layers.len() + 1);
        for layer in &model.layers {
            steps.extend(layer.steps(&model, &rows, &position));
        }
        let head =
            RowProduct { norm: Some((&model.norm, model.eps)), ..plain(vec![&model.head], &rows.stream, &rows.logits) };
        steps.push(RowStep::Product(head));
        let recording = kernels.record(&steps)?;
        drop(steps);
        Ok(Self { kernels, recording, state, rows, model })
    }

    /// Reads `token`, which is below the vocabulary's size, at place `position`, which the cache has room for, and puts its keys and values
    /// there. The logits `[1, vocab_size]` behind it stand until the next call.
    pub(crate) fn read(&mut self, token: u32, position: u32) -> Result<Tensor> {
        self.state.slice_set(&Tensor::new(&[token, position], self.state.device())?, 0, 0)?;
        self.kernels.embed(&self.state.narrow(0, 0, 1)?, &self.model.embedding, &self.rows.stream)?;
        self.recording.replay()?;
        Ok(self.rows.logits.clone())
    }
}

impl LayerRows {
    /// A layer of these weights, with its places in the cache; none where a weight does not lie on the device in `dtype`, or has an adapter.
    pub(super) fn new(
        block_norms: [&Weight; 2],
        (attention, head_norms): HeadRows,
        mlp: [&LinearGroup; 2],
        cache: [Tensor; 2],
        dtype: DType,
    ) -> Result<Option<Self>> {
        let [Some(before_attention), Some(before_mlp)] = block_norms.map(|norm| lying(norm, dtype)) else {
            return Ok(None);
        };
        let [Some(gate_up), Some(down)] = [Projections::of(mlp[0], dtype)?, Projections::of(mlp[1], dtype)?] else {
            return Ok(None);
        };
        let ([qkv, output], block_norms, gate_up) = (attention, [before_attention, before_mlp], gate_up.in_halves()?);
        Ok(Some(Self { block_norms, head_norms, qkv, output, gate_up, down, cache }))
    }

    fn steps<'a>(&'a self, model: &'a Model, rows: &'a Rows, position: &'a Tensor) -> [RowStep<'a>; 5] {
        let Rows { stream, qkv, attended, gated, .. } = rows;
        let [before_attention, before_mlp] = self.block_norms.each_ref().map(|norm| Some((norm, model.eps)));
        let attention = RowAttention {
            qkv,
            head_norms: self.head_norms.as_ref().map(|norms| norms.each_ref()),
            eps: model.eps,
            inv_freq: &model.inv_freq,
            position,
            keys: &self.cache[0],
            values: &self.cache[1],
            out: attended,
            spec: model.attention,
        };
        [
            RowStep::Product(RowProduct { norm: before_attention, ..self.qkv.of_row(stream, qkv) }),
            RowStep::Attention(attention),
            RowStep::Product(RowProduct { residual: Some(stream), ..self.output.of_row(attended, stream) }),
            RowStep::Product(RowProduct { norm: before_mlp, gated: true, ..self.gate_up.of_row(stream, gated) }),
            RowStep::Product(RowProduct { residual: Some(stream), ..self.down.of_row(gated, stream) }),
        ]
    }
}

/// A product and nothing else.
fn plain<'a>(weights: Vec<&'a Tensor>, x: &'a Tensor, y: &'a Tensor) -> RowProduct<'a> {
    RowProduct { weights, x, norm: None, bias: None, residual: None, gated: false, y }
}

/// What kernels for one token at a time must know of a decoder whose layers are all alike and plain.
pub(super) struct Plain<'a> {
    pub(super) attention: AttentionSpec,
    pub(super) intermediate_size: usize,
    pub(super) eps: f32,
    pub(super) inv_freq: Cow<'a, [f32]>,
}

/// None where a layer has what those kernels do not.
pub(super) fn plain_layers(spec: &DecoderSpec) -> Option<Plain<'_>> {
    let (first, [used]) = (spec.layers.first()?, spec.ropes.as_slice()) else { return None };
    let (NormSpec::Rms(norm), AttentionKind::Heads(heads), MlpSpec::Gated(mlp)) =
        (spec.norm, &first.attention, &first.mlp)
    else {
        return None;
    };
    let layout = RopeLayout::whole(heads.attention.head_dim);
    let rope_is_plain = used.layout == layout
        && used.rope.rotary_dim == layout.head_dim
        && used.rope.attention_factor == 1.0
        && !used.rope.depends_on_length();
    let is_plain = rope_is_plain
        && norm.weight_offset == 0.0
        && heads.head_norm.is_none_or(|head_norm| head_norm == HeadNorm::Rms(norm))
        && heads.rope == Some(0)
        && !heads.sinks
        && heads.temperature.is_none()
        && heads.attention.softcap.is_none()
        && mlp.activation == Activation::Silu
        && first.norms == NormPlaces::Before
        && first.residual_multiplier == 1.0
        && spec.embedding_multiplier == 1.0
        && spec.logits == LogitsSpec::default()
        && spec.layers.iter().all(|layer| layer == first);
    let (attention, intermediate_size) = (heads.attention, mlp.intermediate_size);
    is_plain.then(|| Plain { attention, intermediate_size, eps: norm.eps as f32, inv_freq: used.rope.inv_freq(1) })
}

impl fmt::Debug for OneToken {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("OneToken").field("layers", &self.model.layers.len()).finish_non_exhaustive()
    }
}
