use candle_core::{DType, Tensor};

use crate::dequantize::RowOrder;
use crate::file::TensorInfo;
use crate::{Error, GgufFile, Result, names};

impl GgufFile {
    /// The weights of the model by their Hugging Face names, each with its shape (outermost dimension first).
    ///
    /// # Errors
    /// When the architecture is not known, or the file holds a tensor that it has no place for: dropping one would
    /// silently give another model.
    pub fn hf_tensors(&self) -> Result<Vec<(String, &[usize])>> {
        let architecture = self.architecture()?;
        let weights = self.tensors().iter().filter(|tensor| !names::is_table(&tensor.name));
        let named = weights.map(|tensor| match names::to_hf(&tensor.name) {
            Some(name) => Ok((name, tensor.shape.as_slice())),
            None => Err(self.unsupported(format!("tensor '{}' in architecture '{}'", tensor.name, architecture.name))),
        });
        named.collect()
    }

    /// A weight by its Hugging Face name, in that layout, decoded into `dtype` (f32, bf16 or f16) on the CPU.
    ///
    /// llama.cpp's conversion reorders the rows of q and k of `llama` models, heads by heads, because its rotary embedding
    /// turns neighbouring numbers and that of Hugging Face the two halves of a head. That is undone here.
    ///
    /// # Errors
    /// When the architecture is not known, there is no such tensor, or its rows are no whole heads.
    pub fn hf_tensor(&self, hf_name: &str, dtype: DType) -> Result<Tensor> {
        let architecture = self.architecture()?;
        let missing = || Error::MissingTensor { path: self.path.clone(), tensor: hf_name.to_string() };
        let tensor = self.require_tensor(&names::to_gguf(hf_name).ok_or_else(missing)?)?;
        let heads = match hf_name.rsplit('.').nth(1) {
            Some("q_proj") if architecture.pairs_adjacent => Some(self.heads(architecture)?.query),
            Some("k_proj") if architecture.pairs_adjacent => Some(self.heads(architecture)?.key_value),
            _ => None,
        };
        let order = heads.map_or(Ok(RowOrder::Stored), |heads| self.undo_pairs(tensor, heads))?;
        self.decode(tensor, dtype, order)
    }

    fn undo_pairs(&self, tensor: &TensorInfo, heads: u64) -> Result<RowOrder> {
        let rows = tensor.shape.first().copied().unwrap_or_default();
        let head_rows = usize::try_from(heads).ok().filter(|&heads| rows % heads == 0).map(|heads| rows / heads);
        let whole = head_rows.filter(|&head_rows| head_rows % 2 == 0 && head_rows > 0);
        // A quantized vector would have blocks across heads; no converter writes one.
        let vector_of_blocks = tensor.shape.len() == 1 && tensor.block_type.block_size() > 1;
        match whole {
            Some(head_rows) if !vector_of_blocks => Ok(RowOrder::PairsToHalves { head_rows }),
            _ => {
                let expected = format!("rows for {heads} heads of an even size");
                Err(self.malformed(format!("tensor '{}'", tensor.name), expected, format!("{rows} rows")))
            }
        }
    }
}
