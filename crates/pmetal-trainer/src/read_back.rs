//! Reading back what was written.

use std::path::Path;

use candle_core::{DType, Tensor};
use pmetal_lora::AdapterFile;
use pmetal_models::{CausalLMModel, Checkpoint, DecoderSpec, load};
use pmetal_ops::Arena;

use crate::{Error, Result};

/// Rows of a matrix that are compared at a time.
const COMPARED_ROWS: usize = 4096;

/// Reads the adapter back and compares every number.
pub(crate) fn check_adapter(output: &Path, spec: &DecoderSpec, arena: &Arena) -> Result<()> {
    let file = AdapterFile::open(output)?;
    let tensors = file.for_model(spec)?;
    for param in arena.params() {
        let same = match tensors.get(param.name()) {
            Some(read) => bits(read)? == bits(pmetal_lora::saved(&param))?,
            None => false,
        };
        if !same {
            return Err(Error::ReadBack { path: file.path, reason: format!("{} differs", param.name()) });
        }
    }
    Ok(())
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Reads the model back and compares its layers and every number. Results are no measure: products of few rows are summed in another order where
/// weights lie in their files.
pub(crate) fn check_model(output: &Path, model: &dyn CausalLMModel, dtype: DType) -> Result<()> {
    let differs = |what: &str| {
        let reason = format!("{what} differ from those of the trained model");
        Err(Error::ReadBack { path: output.to_path_buf(), reason })
    };
    let again = load(&Checkpoint::open(output)?, dtype, &model.device(), None)?;
    let (written, read) = (model.named_weights(), again.named_weights());
    if again.spec().layers != model.spec().layers || written.len() != read.len() {
        return differs("its layers");
    }
    for ((name, written), (_, read)) in written.iter().zip(&read) {
        let written = written.param().map_or_else(|| written.tensor(), |param| Ok(param.master().clone()))?;
        let read = read.tensor()?;
        for first in (0..read.dim(0)?).step_by(COMPARED_ROWS) {
            let rows = COMPARED_ROWS.min(read.dim(0)? - first);
            let written = written.narrow(0, first, rows)?.to_dtype(read.dtype())?;
            if bits(&written)? != bits(&read.narrow(0, first, rows)?)? {
                return differs(&format!("numbers of {name}"));
            }
        }
    }
    Ok(())
}
