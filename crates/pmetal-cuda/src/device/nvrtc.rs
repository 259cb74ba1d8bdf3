//! CUDA C++ compiled on the user's machine; what was compiled once is kept on disk.

use std::{
    ffi::{CStr, CString, c_char},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::cuda_backend::{
    WrapErr,
    cudarc::{
        driver::{CudaContext, CudaModule},
        nvrtc::{Ptx, result, sys},
    },
};
use pmetal_core::{StagedFile, cache_folder};
use pmetal_metal::{Error, Result};

/// Changes whenever kept files are laid out in another way.
const FORMAT: &str = "kernels 1";

/// Compiles `text` for the context's device, or takes what an earlier run compiled. `name` stands in the compiler's messages. The text
/// needs no header: it is compiled where only the driver and the run-time libraries are.
///
/// # Errors
/// The compiler's words where it refuses the text.
pub(super) fn compile(context: &Arc<CudaContext>, name: &str, text: &str, options: &[&str]) -> Result<Arc<CudaModule>> {
    let (major, minor) = context.compute_capability().w()?;
    let target = Target::of(major * 10 + minor)?;
    let options = target.options(options);
    let kept = place(text, &options);
    // a kept file that the driver does not take is as good as none
    let found = kept.as_ref().and_then(read).map(|image| context.load_module(Ptx::from_binary(image)));
    if let Some(Ok(module)) = found {
        return Ok(module);
    }
    let image = translate(name, text, &options, &target)?;
    if let Some(path) = kept {
        // a folder that cannot be written costs the next run its compilation, nothing more
        let _ = keep(&path, &image);
    }
    Ok(context.load_module(Ptx::from_binary(image)).w()?)
}

/// What the compiler makes code for.
enum Target {
    /// The device itself, with what only its generation has.
    Own(i32),
    /// An older generation, as PTX: the compiler does not know the device yet, its driver translates.
    Older(i32),
}

impl Target {
    fn of(capability: i32) -> Result<Self> {
        let known = architectures()?;
        if known.contains(&capability) {
            return Ok(Self::Own(capability));
        }
        known.into_iter().filter(|&known| known < capability).max().map(Self::Older).ok_or_else(|| Error::Device {
            device: "NVRTC".into(),
            reason: format!(
                "it makes no code for compute capability {}.{}: this GPU is too old for the installed CUDA",
                capability / 10,
                capability % 10
            ),
        })
    }

    fn options(&self, more: &[&str]) -> Vec<String> {
        let architecture = match self {
            // the letter: wgmma and its like are of one generation alone
            Self::Own(own @ 90..) => format!("--gpu-architecture=sm_{own}a"),
            Self::Own(own) => format!("--gpu-architecture=sm_{own}"),
            Self::Older(older) => format!("--gpu-architecture=compute_{older}"),
        };
        let mut options = vec![architecture, "--std=c++17".to_owned()];
        options.extend(more.iter().map(|&option| option.to_owned()));
        options
    }
}

/// The compute capabilities that the compiler knows, times ten.
fn architectures() -> Result<Vec<i32>> {
    let mut count = 0;
    // SAFETY: it writes one integer.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(failed)?;
    let mut known = vec![0; usize::try_from(count).unwrap_or_default()];
    // SAFETY: it writes as many integers as it said.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(failed)?;
    Ok(known)
}

/// The compiler's version, as in `13.0`.
pub(super) fn version() -> Result<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: it writes two integers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(failed)?;
    Ok(format!("{major}.{minor}"))
}

/// A program of the compiler, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed here alone; there is nothing to do about an error.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Machine code for the target, or PTX.
fn translate(name: &str, text: &str, options: &[String], target: &Target) -> Result<Vec<u8>> {
    let (Ok(source), Ok(label)) = (CString::new(text), CString::new(name)) else {
        return Err(refused(name, "its text holds a NUL byte"));
    };
    let program = Program(result::create_program(&source, Some(&label)).map_err(failed)?);
    // SAFETY: the program is alive, as is its text.
    if unsafe { result::compile_program(program.0, options) }.is_err() {
        // SAFETY: as above.
        let log = unsafe { result::get_program_log(program.0) }.map_err(failed)?;
        // SAFETY: the compiler ends its log with a NUL byte.
        let log = unsafe { CStr::from_ptr(log.as_ptr()) };
        return Err(refused(name, log.to_string_lossy().trim()));
    }
    type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
    type Get = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;
    let (size, get): (Size, Get) = match target {
        Target::Own(_) => (sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
        Target::Older(_) => (sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
    };
    let mut bytes = 0usize;
    // SAFETY: it was compiled; the size is written to `bytes`.
    unsafe { size(program.0, &mut bytes) }.result().map_err(failed)?;
    let mut image = vec![0u8; bytes];
    // SAFETY: the compiler writes as many bytes as it said.
    unsafe { get(program.0, image.as_mut_ptr().cast()) }.result().map_err(failed)?;
    Ok(image)
}

fn failed(error: result::NvrtcError) -> Error {
    Error::Device { device: "NVRTC".into(), reason: error.to_string() }
}

fn refused(name: &str, reason: &str) -> Error {
    Error::Device { device: format!("kernel text {name}"), reason: reason.to_owned() }
}

/// The file of a text compiled under options; none where there is no folder for it.
fn place(text: &str, options: &[String]) -> Option<PathBuf> {
    let folder = cache_folder("kernels")?;
    let mut hasher = blake3::Hasher::new();
    for part in [FORMAT, &version().ok()?, &options.join(" "), text] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let key: String = hasher.finalize().to_hex().chars().take(32).collect();
    Some(folder.join(key))
}

/// A kept image. Its hash stands before it: the driver is given no length, and a cut file would have it read what is not there.
fn read(path: impl AsRef<Path>) -> Option<Vec<u8>> {
    let file = fs::read(path).ok()?;
    let (hash, image) = file.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(image).as_bytes() == hash).then(|| image.to_vec())
}

fn keep(path: &Path, image: &[u8]) -> pmetal_core::Result<()> {
    let staged = StagedFile::new(path)?;
    let file = [blake3::hash(image).as_bytes().as_slice(), image].concat();
    fs::write(staged.path(), file).map_err(pmetal_core::Error::io("write", staged.path()))?;
    staged.commit()
}

/// Has the compiler take a text for a compute capability, times ten: no GPU is needed to know whether it does.
#[cfg(test)]
pub(super) fn takes(name: &str, text: &str, options: &[&str], capability: i32) -> Result<()> {
    let target = Target::of(capability)?;
    translate(name, text, &target.options(options), &target).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::kernels;

    /// Needs the compiler, but no GPU.
    #[test]
    fn every_shared_text_compiles_without_headers() -> Result<()> {
        for (name, text) in kernels::all_texts()? {
            for capability in [80, 90] {
                let target = Target::of(capability)?;
                let options = target.options(&[]);
                assert!(!translate(&name, &text, &options, &target)?.is_empty(), "{name} for {capability}");
            }
        }
        Ok(())
    }

    #[test]
    fn what_the_compiler_says_is_told() {
        let target = Target::Own(90);
        let error = translate("wrong.metal", "void f() { x; }", &target.options(&[]), &target).unwrap_err().to_string();
        assert!(error.contains("wrong.metal") && error.contains("\"x\" is undefined"), "{error}");
    }

    #[test]
    fn a_broken_kept_file_is_not_read() -> std::io::Result<()> {
        let folder = std::env::temp_dir().join(format!("pmetal-cuda-{}", std::process::id()));
        let path = folder.join("image");
        keep(&path, b"an image").map_err(std::io::Error::other)?;
        assert_eq!(read(&path).as_deref(), Some(b"an image".as_slice()));
        let whole = fs::read(&path)?;
        for broken in [&whole[..whole.len() - 1], &whole[..7], &[], &[whole.as_slice(), b"more"].concat()] {
            fs::write(&path, broken)?;
            assert_eq!(read(&path), None);
        }
        fs::remove_dir_all(folder)
    }
}
