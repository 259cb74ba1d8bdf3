//! The gradient of cross-entropy by clusters of thread blocks: `kernels/cross_entropy.cu` in the place of the shared text's kernels, whose
//! arguments it takes, for the rows that it fits.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use candle_core::{
    DType,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, sys},
    },
};
use pmetal_metal::{
    Call, Result,
    kernels::{CAPPED_CROSS_ENTROPY_GRADIENT, CROSS_ENTROPY_GRADIENT, CUDA_PRELUDE},
};

use super::{
    CudaGpu,
    kernels::{ask, element},
};

const NAME: &str = "cross_entropy.cu";
const TEXT: &str = include_str!("../../kernels/cross_entropy.cu");

/// Threads of a thread block.
const THREADS: usize = 512;
/// How many times eight logits a thread holds at most: more would leave a multiprocessor no registers for a second thread block.
const MOST_OCTETS: usize = 10;
/// Shorter rows are in the caches when the shared kernel comes back to them.
const SHORTEST: usize = 1 << 14;
/// The first GPUs with clusters, as major compute capability.
const CAPABILITY: i32 = 9;

/// The kernels that were asked for, compiled.
#[derive(Default)]
pub(super) struct CrossEntropy {
    built: RwLock<HashMap<(DType, Cut, bool), CudaFunction>>,
}

/// How a row is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Cut {
    /// Thread blocks of a cluster.
    blocks: usize,
    /// How many times eight logits a thread holds.
    octets: usize,
}

impl Cut {
    /// The fewest thread blocks for rows of `vocab` logits; none where they do not fit a cluster that every such GPU has.
    fn of(vocab: usize) -> Option<Self> {
        let cut = |blocks| Self { blocks, octets: (vocab / 8).div_ceil(blocks * THREADS) };
        let whole = vocab.is_multiple_of(8) && vocab >= SHORTEST;
        [1, 2, 4, 8].into_iter().map(cut).find(|cut| whole && cut.octets <= MOST_OCTETS)
    }

    fn options(self, capped: bool) -> [String; 4] {
        let defined = |name: &str, value| format!("--define-macro={name}={value}");
        let capped = defined("CAPPED", usize::from(capped));
        [defined("BLOCKS", self.blocks), defined("OCTETS", self.octets), defined("ROW_THREADS", THREADS), capped]
    }
}

impl CrossEntropy {
    /// Asks for the call's work, where it is the gradient of cross-entropy and its rows fit; false, and nothing done, otherwise.
    pub(super) fn launch(&self, gpu: &CudaGpu, call: &Call) -> Result<bool> {
        let [logits, ..] = call.buffers else { return Ok(false) };
        let capped = call.kernel.name == CAPPED_CROSS_ENTROPY_GRADIENT.name;
        if !capped && call.kernel.name != CROSS_ENTROPY_GRADIENT.name {
            return Ok(false);
        }
        let (rows, vocab) = logits.dims2()?;
        let short = matches!(call.dtype, DType::F16 | DType::BF16);
        let aligned = logits.layout().start_offset().is_multiple_of(8);
        let clusters = gpu.context.compute_capability().w()?.0 >= CAPABILITY;
        let Some(cut) = Cut::of(vocab).filter(|_| short && aligned && clusters) else { return Ok(false) };
        let function = self.function(gpu, call.dtype, cut, capped)?;
        ask(gpu, call, function, [rows * cut.blocks, 1, 1], THREADS)?;
        Ok(true)
    }

    fn function(&self, gpu: &CudaGpu, dtype: DType, cut: Cut, capped: bool) -> Result<sys::CUfunction> {
        let key = (dtype, cut, capped);
        if let Some(function) = self.built.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(function.cu_function());
        }
        let options = cut.options(capped);
        let module = gpu.compile(NAME, &text(dtype)?, &options.each_ref().map(String::as_str))?;
        let function = module.load_function("cross_entropy_gradient_cluster").w()?;
        let mut built = self.built.write().unwrap_or_else(PoisonError::into_inner);
        Ok(built.entry(key).or_insert(function).cu_function())
    }
}

fn text(dtype: DType) -> Result<String> {
    Ok(format!("{CUDA_PRELUDE}\ntypedef {} T;\n#line 1 \"{NAME}\"\n{TEXT}", element(dtype)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::nvrtc::takes;

    #[test]
    fn rows_are_cut_into_as_few_blocks_as_hold_them() {
        let cut = |blocks, octets| Some(Cut { blocks, octets });
        assert_eq!([32_000, 128_256, 151_936, 262_144].map(Cut::of), [cut(1, 8), cut(4, 8), cut(4, 10), cut(8, 8)]);
        // too short, rows that begin at odd places, too long
        assert_eq!([8192, 50_257, 400_000].map(Cut::of), [None; 3]);
    }

    /// Needs the compiler, but no GPU.
    #[test]
    fn it_compiles_without_headers() -> Result<()> {
        for (dtype, vocab, capped) in
            [(DType::BF16, 151_936, false), (DType::F16, 32_000, false), (DType::BF16, 262_144, true)]
        {
            let options = Cut::of(vocab).map(|cut| cut.options(capped)).unwrap_or_default();
            takes(NAME, &text(dtype)?, &options.each_ref().map(String::as_str), 90)?;
        }
        Ok(())
    }
}
