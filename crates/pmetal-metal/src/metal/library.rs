//! Kernel texts compiled for a device, each file for each dtype at its first use.

use std::collections::{HashMap, hash_map::Entry};

use candle_core::DType;
use candle_metal_kernels::metal::{ComputePipeline, Device, Library};
use objc2::{available, rc::Retained};
use objc2_metal::{MTLCompileOptions, MTLLanguageVersion, MTLMathFloatingPointFunctions, MTLMathMode};

use super::type_name;
use crate::{
    Kernel,
    kernels::{METAL_PRELUDE, METAL_TEXTS, TEXTS},
};

/// Compiled files and kernels.
#[derive(Default)]
pub(super) struct Programs {
    libraries: HashMap<(&'static str, DType), Library>,
    pipelines: HashMap<(&'static str, DType), ComputePipeline>,
}

impl Programs {
    /// A kernel, ready to run; else why not.
    pub(super) fn pipeline(
        &mut self,
        device: &Device,
        kernel: &Kernel,
        dtype: DType,
    ) -> Result<ComputePipeline, String> {
        let place = match self.pipelines.entry((kernel.name, dtype)) {
            Entry::Occupied(pipeline) => return Ok(pipeline.get().clone()),
            Entry::Vacant(place) => place,
        };
        let library = match self.libraries.entry((kernel.file, dtype)) {
            Entry::Occupied(library) => library.into_mut(),
            Entry::Vacant(place) => place.insert(compile(device, kernel.file, dtype)?),
        };
        let failed = |e: candle_metal_kernels::MetalKernelError| format!("kernel {}: {e}", kernel.name);
        let function = library.get_function(kernel.name, None).map_err(failed)?;
        let pipeline = device.new_compute_pipeline_state_with_function(&function).map_err(failed)?;
        Ok(place.insert(pipeline).clone())
    }
}

fn compile(device: &Device, file: &str, dtype: DType) -> Result<Library, String> {
    let t = type_name(dtype).ok_or_else(|| format!("there are no kernels of {dtype:?}"))?;
    let mut texts = TEXTS.iter().chain(METAL_TEXTS);
    let (_, text) = texts.find(|(name, _)| *name == file).ok_or_else(|| format!("there is no {file}"))?;
    // behind the prelude, whose headers have names of their own
    let source = format!("{METAL_PRELUDE}\ntypedef {t} T;\n{text}");
    device.new_library_with_source(&source, Some(&options())).map_err(|e| {
        let hint = if dtype == DType::BF16 { " (bfloat needs Metal 3.1: an Apple GPU and macOS 14)" } else { "" };
        format!("{file} does not compile for {t}{hint}: {e}")
    })
}

/// No fast math: it would take infinities and NaNs for impossible, which the softmax and the skipping of broken steps rely on.
fn options() -> Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    if available!(macos = 14.0) {
        options.setLanguageVersion(MTLLanguageVersion::Version3_1);
    }
    if available!(macos = 15.0) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[allow(deprecated, reason = "what there was before macOS 15")]
        options.setFastMathEnabled(false);
    }
    options
}
