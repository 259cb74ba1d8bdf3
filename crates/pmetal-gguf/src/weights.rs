use std::collections::HashMap;

use candle_core::{DType, Tensor};

use crate::architecture::Architecture;
use crate::dequantize::Change;
use crate::file::TensorInfo;
use crate::{Error, GgufFile, Result, names};

/// The weights of the model under their Hugging Face names.
#[derive(Debug, Default)]
pub(crate) struct Weights {
    list: Vec<Weight>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Weight {
    name: String,
    shape: Vec<usize>,
    source: Source,
}

/// The tensors of the file a weight is made of, by their names.
#[derive(Debug)]
enum Source {
    One(String),
    /// The two halves of DeepSeek's expansion: keys `[heads, rank, keys]`, each head's transposed, and values `[heads, values, rank]`.
    KeysAndValues {
        keys: String,
        values: String,
    },
}

impl GgufFile {
    /// The weights of the model by their Hugging Face names, each with its shape (outermost dimension first).
    ///
    /// Experts come stacked, whatever form the family's own files have: `model.layers.N.(the MLP's module).experts.gate_proj.weight`
    /// and `….up_proj.weight` `[experts, intermediate, hidden]`, or both in `….gate_up_proj.weight` with the gate's rows first;
    /// `….down_proj.weight` `[experts, hidden, intermediate]`; their biases `[experts, rows]`.
    ///
    /// # Errors
    /// When the architecture is not known, or the file holds a tensor that it has no place for: dropping one would
    /// silently give another model.
    pub fn hf_tensors(&self) -> Result<Vec<(String, &[usize])>> {
        Ok(self.weights()?.list.iter().map(|weight| (weight.name.clone(), weight.shape.as_slice())).collect())
    }

    /// A weight by its Hugging Face name, in that layout, decoded into `dtype` (f32, bf16 or f16) on the CPU.
    ///
    /// What llama.cpp's conversion does to some architectures' tensors is undone: rows of q and k reordered heads by heads, because
    /// its rotary embedding turns neighbouring numbers and that of Hugging Face the two halves of a head; norms with one added;
    /// the expansion of DeepSeek's keys and values cut in two.
    ///
    /// # Errors
    /// When the architecture is not known, there is no such tensor, or its rows are no whole heads.
    pub fn hf_tensor(&self, hf_name: &str, dtype: DType) -> Result<Tensor> {
        match &self.weight(hf_name)?.source {
            Source::One(name) => {
                let tensor = self.require_tensor(name)?;
                self.decode(tensor, dtype, self.change(tensor)?)
            }
            Source::KeysAndValues { keys, values } => self.keys_and_values(keys, values, dtype),
        }
    }

    /// One expert's part of a weight: `hf_tensor(hf_name)[index]`, without decoding the others.
    ///
    /// # Errors
    /// As [`Self::hf_tensor`]; when the weight has fewer parts, only one dimension, or is not stored as it is.
    pub fn hf_slice(&self, hf_name: &str, index: usize, dtype: DType) -> Result<Tensor> {
        let weight = self.weight(hf_name)?;
        let whole = match &weight.source {
            Source::One(name) => Some(self.require_tensor(name)?),
            Source::KeysAndValues { .. } => None,
        };
        let part = |tensor: &&TensorInfo| tensor.shape.len() > 1 && tensor.shape.first().is_some_and(|&n| index < n);
        match whole.filter(part) {
            Some(tensor) if matches!(self.change(tensor)?, Change::None) => self.decode_part(tensor, index, dtype),
            _ => {
                let expected = format!("a part {index} along the outermost dimension");
                Err(self.malformed(format!("tensor '{hf_name}'"), expected, format!("shape {:?}", weight.shape)))
            }
        }
    }

    fn weight(&self, hf_name: &str) -> Result<&Weight> {
        let weights = self.weights()?;
        let found = weights.by_name.get(hf_name).and_then(|&index| weights.list.get(index));
        found.ok_or_else(|| Error::MissingTensor { path: self.path.clone(), tensor: hf_name.to_string() })
    }

    fn weights(&self) -> Result<&Weights> {
        match self.weights.get() {
            Some(weights) => Ok(weights),
            None => {
                let named = self.name_weights(self.architecture()?)?;
                Ok(self.weights.get_or_init(|| named))
            }
        }
    }

    fn name_weights(&self, architecture: &Architecture) -> Result<Weights> {
        let predicting = self.unsigned(&architecture.key("nextn_predict_layers"))?.unwrap_or(0) > 0;
        let layers = if predicting { Some(self.layers(architecture)?) } else { None };
        let beyond = |name: &str| names::in_layer(name).is_some_and(|(layer, _)| layers.is_some_and(|n| layer >= n));
        let mut weights = Weights::default();
        for tensor in self.tensors() {
            if names::is_table(architecture, &tensor.name) || beyond(&tensor.name) {
                continue;
            }
            let Some(name) = names::to_hf(architecture, &tensor.name) else {
                let what = format!("tensor '{}' in architecture '{}'", tensor.name, architecture.name);
                return Err(self.unsupported(what));
            };
            let (shape, source) = match tensor.name.rsplit_once(".attn_") {
                Some((layer, "k_b.weight")) => self.halves(tensor, format!("{layer}.attn_v_b.weight"))?,
                Some((layer, "v_b.weight")) => {
                    self.require_tensor(&format!("{layer}.attn_k_b.weight"))?;
                    continue;
                }
                _ => (tensor.shape.clone(), Source::One(tensor.name.clone())),
            };
            if weights.by_name.insert(name.clone(), weights.list.len()).is_some() {
                return Err(self.malformed(format!("tensor '{}'", tensor.name), "one tensor for each weight", "two"));
            }
            weights.list.push(Weight { name, shape, source });
        }
        Ok(weights)
    }

    /// The shape of keys and values together, `[heads * (keys + values), rank]`, and where they lie.
    fn halves(&self, keys: &TensorInfo, values: String) -> Result<(Vec<usize>, Source)> {
        let other = self.require_tensor(&values)?;
        match (keys.shape.as_slice(), other.shape.as_slice()) {
            (&[heads, rank, keys_rows], &[value_heads, value_rows, value_rank])
                if (heads, rank) == (value_heads, value_rank) =>
            {
                // neither number of rows is beyond what the file holds
                let shape = vec![heads * (keys_rows + value_rows), rank];
                Ok((shape, Source::KeysAndValues { keys: keys.name.clone(), values }))
            }
            (keys, values) => {
                let what = format!("tensor '{}'", other.name);
                Err(self.malformed(what, format!("the heads and rank of keys {keys:?}"), format!("{values:?}")))
            }
        }
    }

    fn keys_and_values(&self, keys: &str, values: &str, dtype: DType) -> Result<Tensor> {
        let (keys, values) = (self.dequantize(keys, dtype)?, self.dequantize(values, dtype)?);
        let joined = keys.transpose(1, 2).and_then(|keys| Tensor::cat(&[&keys, &values], 1)?.flatten(0, 1));
        joined.map_err(|source| self.tensor_error("attn_k_b", source))
    }

    /// What conversion did to a tensor.
    fn change(&self, tensor: &TensorInfo) -> Result<Change> {
        let architecture = self.architecture()?;
        let name = names::in_layer(&tensor.name).map_or(tensor.name.as_str(), |(_, name)| name);
        let heads = match name.split('.').next() {
            Some("attn_q") if architecture.pairs_adjacent => self.heads(architecture)?.query,
            Some("attn_k") if architecture.pairs_adjacent => self.heads(architecture)?.key_value,
            Some(stem) if architecture.norms_plus_one && stem.ends_with("_norm") => return Ok(Change::OneAdded),
            _ => return Ok(Change::None),
        };
        self.undo_pairs(tensor, heads)
    }

    fn undo_pairs(&self, tensor: &TensorInfo, heads: u64) -> Result<Change> {
        let rows = tensor.shape.first().copied().unwrap_or_default();
        let head_rows = usize::try_from(heads).ok().filter(|&heads| rows % heads == 0).map(|heads| rows / heads);
        let whole = head_rows.filter(|&head_rows| head_rows % 2 == 0 && head_rows > 0);
        // A quantized vector would have blocks across heads; no converter writes one.
        let vector_of_blocks = tensor.shape.len() == 1 && tensor.block_type.block_size() > 1;
        match whole {
            Some(head_rows) if !vector_of_blocks => Ok(Change::PairsAdjacent { head_rows }),
            _ => {
                let expected = format!("rows for {heads} heads of an even size");
                Err(self.malformed(format!("tensor '{}'", tensor.name), expected, format!("{rows} rows")))
            }
        }
    }
}
