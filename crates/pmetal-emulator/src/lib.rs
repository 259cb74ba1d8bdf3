//! Runs PMetal's GPU kernel texts on any CPU, strictly: for tests.
//!
//! [`Emulator`] is a [`pmetal_metal::Gpu`] over CPU tensors. It compiles the texts of `pmetal-metal/kernels` as C++ with the machine's
//! compiler (`$CXX`, else `c++`) under the preludes in `prelude/`, one shared object for each file and dtype, kept in the system's folder
//! for temporary files:
//!
//! - `fibers.h`: the threads of a threadgroup are fibers, run in another order in each threadgroup; barriers and SIMD functions wait for
//!   all, and threads that wait for what cannot come are reported.
//! - `memory.h`: every access checks bounds, whether the element was ever written, and races: with threads of the same threadgroup
//!   when no barrier lies between, and with other threadgroups of the launch.
//! - `host.h`: the words of the dialect; address spaces, `half` and `bfloat` are types of their own. `matrix.h`: matrices of SIMD groups.
//! - `launch.h`: from a launch's arguments to a kernel's. Elements of WRITE buffers that no thread wrote are reported.
//!
//! What is caught comes back as [`pmetal_metal::Error::Device`], with the kernel, the thread, and the element.

mod gemm;
mod memory;
mod program;
mod rest;

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Tensor};
use pmetal_metal::{
    AttentionRows, AttentionSpec, Call, Error, Facts, Gemm, Gpu, HostMarks, Kernel, Marks, Memory, Resting, Result,
    Statistics,
    kernels::{ALL, METAL_ALL, METAL_TEXTS, TEXTS},
};

/// Kernels that have run in this process, each with its dtype.
static LAUNCHED: Mutex<Vec<(&'static str, DType)>> = Mutex::new(Vec::new());

/// A GPU that is played by the CPU; its tensors are candle's CPU tensors.
#[derive(Clone, Debug)]
pub struct Emulator {
    /// Files: names and texts.
    texts: Vec<(String, String)>,
    kernels: Vec<&'static Kernel>,
}

impl Emulator {
    /// An emulator of all kernels of `pmetal-metal`, those for Metal's matrix units too.
    pub fn new() -> Self {
        let texts = TEXTS.iter().chain(METAL_TEXTS).map(|(file, text)| (file.to_string(), text.to_string())).collect();
        Self { texts, kernels: [ALL, METAL_ALL].concat() }
    }

    /// An emulator of one text with its `kernels`, or of a changed text of `pmetal-metal`.
    pub fn of(file: &str, text: &str, kernels: &[&'static Kernel]) -> Self {
        Self { texts: vec![(file.into(), text.into())], kernels: kernels.to_vec() }
    }

    /// The names of its files.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.texts.iter().map(|(file, _)| file.as_str())
    }

    /// Compiles one file for a dtype, unless it is compiled already.
    ///
    /// # Errors
    /// [`Error::Device`] with the compiler's words.
    pub fn compile(&self, file: &str, dtype: DType) -> Result<()> {
        self.program(file, dtype).map(drop)
    }

    fn program(&self, file: &str, dtype: DType) -> Result<program::Program> {
        let (_, text) =
            self.texts.iter().find(|(name, _)| name == file).ok_or_else(|| refused(format!("no {file}")))?;
        let kernels: Vec<&str> = self.kernels.iter().filter(|k| k.file == file).map(|k| k.name).collect();
        program::program(file, text, &kernels, dtype).map_err(refused)
    }
}

impl Default for Emulator {
    fn default() -> Self {
        Self::new()
    }
}

/// The kernels that an [`Emulator`] has run to their end in this process, each with the dtype it was compiled for.
pub fn launched() -> Vec<(&'static str, DType)> {
    LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn refused(reason: impl Into<String>) -> Error {
    Error::Device { device: "emulator".into(), reason: reason.into() }
}

impl Gpu for Emulator {
    fn launch(&self, call: &Call) -> Result<()> {
        let program = self.program(call.kernel.file, call.dtype)?;
        let mut memory = memory::Copies::of(call)?;
        program.launch(call, &mut memory).map_err(refused)?;
        memory.write_back(call)?;
        let mut launched = LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner);
        let this = (call.kernel.name, call.dtype);
        if !launched.contains(&this) {
            launched.push(this);
        }
        Ok(())
    }

    fn gemm(&self, product: &Gemm) -> Result<()> {
        gemm::gemm(product)
    }

    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<Option<Statistics>> {
        Ok(pmetal_metal::attention_forward(self, [q, k, v], out, rows, spec)?.map(Statistics::Natural))
    }

    fn attention_backward(
        &self,
        dout: &Tensor,
        qkv: [&Tensor; 3],
        out: &Tensor,
        stats: &Tensor,
        grads: [&Tensor; 3],
        rows: &AttentionRows,
        spec: &AttentionSpec,
    ) -> Result<()> {
        pmetal_metal::attention_backward(self, dout, qkv, out, stats, grads, rows, spec)
    }

    fn rest(&self, tensor: &Tensor) -> Result<Option<Box<dyn Resting>>> {
        rest::rested(tensor).map(Some)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// What the allocator of this process counts, where it is `pmetal_cpu`'s; only the address space bounds it.
    fn memory(&self) -> Result<Memory> {
        let (live, peak) = (pmetal_cpu::live_bytes() as u64, pmetal_cpu::peak_bytes() as u64);
        Ok(Memory { live, peak, total: isize::MAX as u64 })
    }

    fn reset_peak(&self) -> Result<()> {
        pmetal_cpu::reset_peak();
        Ok(())
    }

    fn facts(&self) -> Facts {
        Facts { name: "emulator".into(), driver: program::compiler(), features: vec!["SIMD groups of 32".into()] }
    }

    /// A launch has computed when it returns.
    fn marks(&self) -> Result<Box<dyn Marks>> {
        Ok(Box::new(HostMarks::default()))
    }
}
