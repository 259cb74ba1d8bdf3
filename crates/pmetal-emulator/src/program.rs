//! Kernel texts as shared objects: compiling, keeping, loading, calling.

use std::{
    collections::HashMap,
    env,
    ffi::{CString, c_char, c_int, c_void},
    fmt::Write as _,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use candle_core::DType;
use libloading::{Library, Symbol};
use pmetal_metal::{Access, Call};

use crate::memory::Copies;

/// The preludes before the text, in the order in which they build on each other.
const PRELUDES: [(&str, &str); 4] = [
    ("fibers.h", include_str!("../prelude/fibers.h")),
    ("memory.h", include_str!("../prelude/memory.h")),
    ("host.h", include_str!("../prelude/host.h")),
    ("matrix.h", include_str!("../prelude/matrix.h")),
];
/// The prelude behind the text.
const LAUNCH: &str = include_str!("../prelude/launch.h");

/// No contraction, so that every machine rounds alike; hidden names, so that shared objects do not share their state; doubles, which Metal
/// does not have, are errors.
const FLAGS: [&str; 12] = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-ffp-contract=off",
    "-Werror=double-promotion",
    "-Werror=return-type",
    "-Werror=uninitialized",
];

/// A loaded text. Its state is its own, so one launch at a time runs in it.
#[derive(Clone)]
pub(crate) struct Program(Arc<Mutex<Library>>);

/// What a text's `launch_NAME` takes: `Request` in fibers.h.
#[repr(C)]
struct Request {
    buffers: *const Buffer,
    params: *const c_void,
    buffer_count: u32,
    params_bytes: u32,
    groups: [u32; 3],
    threads: u32,
    message: *mut c_char,
    message_bytes: u32,
}

/// `Buffer` in fibers.h.
#[repr(C)]
struct Buffer {
    name: *const c_char,
    data: *mut u8,
    size: u64,
    misalignment: u64,
    width: u64,
    pitch: u64,
    element_bytes: u32,
    access: u32,
}

type Slot = Arc<OnceLock<Result<Program, String>>>;

/// What this process has compiled or loaded, by the hash of the source.
static PROGRAMS: OnceLock<Mutex<HashMap<u64, Slot>>> = OnceLock::new();

/// The C++ compiler's command.
pub(crate) fn compiler() -> String {
    env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// The program of a text, for one dtype; other dtypes and texts may be compiled at the same time.
pub(crate) fn program(file: &str, text: &str, kernels: &[&str], dtype: DType) -> Result<Program, String> {
    let source = source(file, text, kernels, dtype)?;
    let mut hasher = DefaultHasher::new();
    (&source, FLAGS, compiler(), env::consts::ARCH).hash(&mut hasher);
    let hash = hasher.finish();
    let slot = lock(PROGRAMS.get_or_init(Mutex::default)).entry(hash).or_default().clone();
    slot.get_or_init(|| load(file, &source, hash)).clone()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn source(file: &str, text: &str, kernels: &[&str], dtype: DType) -> Result<String, String> {
    let element = match dtype {
        DType::F32 => "float",
        DType::F16 => "half",
        DType::BF16 => "bfloat",
        other => return Err(format!("kernels of {other:?}")),
    };
    let mut source = String::new();
    for (name, prelude) in PRELUDES {
        source += &format!("#line 1 \"{name}\"\n{prelude}\n");
    }
    // The text sees the dialect's names before the host's.
    source += &format!("#define T {element}\nnamespace dialect {{\n#line 1 \"{file}\"\n{text}\n}}\n#undef T\n");
    source += &format!("#line 1 \"launch.h\"\n{LAUNCH}\n");
    for kernel in kernels {
        let _ = writeln!(source, "EXPORT({kernel})");
    }
    Ok(source)
}

fn load(file: &str, source: &str, hash: u64) -> Result<Program, String> {
    let folder = env::temp_dir().join("pmetal-emulator");
    let object = folder.join(format!("{hash:016x}.so"));
    if !object.exists() {
        compile(file, source, &folder, &object)?;
    }
    // SAFETY: the object was compiled from our own prelude and text; nothing runs as it is loaded.
    let library = unsafe { Library::new(&object) }.map_err(|e| format!("{file}: {e}"))?;
    Ok(Program(Arc::new(Mutex::new(library))))
}

/// Compiles beside the object's place, then renames: another process may do the same.
fn compile(file: &str, source: &str, folder: &Path, object: &PathBuf) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    let beside = tempfile::Builder::new().suffix(".so").tempfile_in(folder).map_err(failed)?;
    let command = compiler();
    let mut child = Command::new(&command)
        .args(FLAGS)
        .args(["-x", "c++", "-", "-lm", "-o"])
        .arg(beside.path())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("the C++ compiler {command:?} does not start: {e}; set CXX to one"))?;
    // A compiler that gives up before it has read all says why itself.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(source.as_bytes()));
    let output = child.wait_with_output().map_err(|e| format!("{command}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{file} does not compile: {}", String::from_utf8_lossy(&output.stderr)));
    }
    beside.persist(object).map(drop).map_err(|e| failed(e.error))
}

impl Program {
    /// Runs a kernel on copies of the call's tensors.
    pub(crate) fn launch(&self, call: &Call, copies: &mut Copies) -> Result<(), String> {
        let kernel = call.kernel;
        let names: Vec<CString> = kernel.buffers.iter().filter_map(|b| CString::new(b.name).ok()).collect();
        let buffers: Vec<Buffer> = (kernel.buffers.iter().zip(&names).zip(&mut copies.0))
            .map(|((buffer, name), copy)| Buffer {
                name: name.as_ptr(),
                data: copy.data(),
                size: copy.len as u64,
                misalignment: copy.misalignment as u64,
                width: copy.width as u64,
                pitch: copy.pitch as u64,
                element_bytes: buffer.element.dtype(call.dtype).size_in_bytes() as u32,
                access: match buffer.access {
                    Access::Read => 0,
                    Access::Write => 1,
                    Access::Update => 2,
                },
            })
            .collect();
        let mut params = vec![0u64; call.params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut params)[..call.params.len()].copy_from_slice(call.params);
        let mut message = [0u8; 1024];
        let request = Request {
            buffers: buffers.as_ptr(),
            params: params.as_ptr().cast(),
            buffer_count: buffers.len() as u32,
            params_bytes: call.params.len() as u32,
            groups: call.grid.groups.map(|n| n as u32),
            threads: call.grid.threads as u32,
            message: message.as_mut_ptr().cast(),
            message_bytes: message.len() as u32,
        };
        let library = lock(&self.0);
        let name = format!("launch_{}", kernel.name);
        // SAFETY: the text was compiled with this function for each of its kernels, of this type.
        let launch: Symbol<unsafe extern "C" fn(&Request) -> c_int> =
            unsafe { library.get(&name) }.map_err(|e| e.to_string())?;
        // SAFETY: the request and all it points to live until it returns; the text checks its signature against it, and every access
        // against the sizes.
        match unsafe { launch(&request) } {
            0 => Ok(()),
            _ => Err(String::from_utf8_lossy(message.split(|&b| b == 0).next().unwrap_or_default()).into_owned()),
        }
    }
}
