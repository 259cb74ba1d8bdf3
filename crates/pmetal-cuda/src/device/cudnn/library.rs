//! The few functions of cuDNN's backend API that are used, loaded at run time, and its descriptors.
//!
//! Names and numbers are those of cuDNN 9's `cudnn_graph.h`; within a major version they do not change.

use std::{
    ffi::{CStr, c_char, c_void},
    ptr,
    sync::Arc,
};

use libloading::Library as Loaded;
use pmetal_metal::{Error, Result};

/// A stream of the driver.
pub(super) type Stream = *mut c_void;
/// An opaque object of cuDNN.
type Opaque = *mut c_void;

/// The library and a handle on it that works behind one stream.
pub(super) struct Library {
    create: unsafe extern "C" fn(i32, *mut Opaque) -> i32,
    destroy: unsafe extern "C" fn(Opaque) -> i32,
    set: unsafe extern "C" fn(Opaque, i32, i32, i64, *const c_void) -> i32,
    get: unsafe extern "C" fn(Opaque, i32, i32, i64, *mut i64, *mut c_void) -> i32,
    finalize: unsafe extern "C" fn(Opaque) -> i32,
    execute: unsafe extern "C" fn(Opaque, Opaque, Opaque) -> i32,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    close: unsafe extern "C" fn(Opaque) -> i32,
    handle: Opaque,
    version: usize,
    _loaded: Loaded,
}

// SAFETY: a handle may be used from any thread, by one at a time: `Cudnn` keeps everything behind a mutex.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The library of this machine, with a handle on `stream` of the current context; none where there is none.
    pub(super) fn open(stream: Stream) -> Option<Arc<Self>> {
        // SAFETY: cuDNN's initialisers are those of an ordinary library.
        let loaded = unsafe { Loaded::new("libcudnn.so.9") }.ok()?;
        // SAFETY: each symbol has the type that cuDNN 9 declares; the pointers live no longer than the library, kept beside them.
        unsafe {
            let version: unsafe extern "C" fn() -> usize = *loaded.get(b"cudnnGetVersion\0").ok()?;
            let new: unsafe extern "C" fn(*mut Opaque) -> i32 = *loaded.get(b"cudnnCreate\0").ok()?;
            let set_stream: unsafe extern "C" fn(Opaque, Stream) -> i32 = *loaded.get(b"cudnnSetStream\0").ok()?;
            let mut library = Self {
                create: *loaded.get(b"cudnnBackendCreateDescriptor\0").ok()?,
                destroy: *loaded.get(b"cudnnBackendDestroyDescriptor\0").ok()?,
                set: *loaded.get(b"cudnnBackendSetAttribute\0").ok()?,
                get: *loaded.get(b"cudnnBackendGetAttribute\0").ok()?,
                finalize: *loaded.get(b"cudnnBackendFinalize\0").ok()?,
                execute: *loaded.get(b"cudnnBackendExecute\0").ok()?,
                last_error: *loaded.get(b"cudnnGetLastErrorString\0").ok()?,
                close: *loaded.get(b"cudnnDestroy\0").ok()?,
                handle: ptr::null_mut(),
                version: version(),
                _loaded: loaded,
            };
            if new(&mut library.handle) != 0 || set_stream(library.handle, stream) != 0 {
                return None;
            }
            Some(Arc::new(library))
        }
    }

    /// As in 91900 for 9.19.0.
    pub(super) const fn version(&self) -> usize {
        self.version
    }

    fn check(&self, status: i32, what: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let mut words = [0 as c_char; 1024];
        // SAFETY: at most as many bytes are written, the last of them 0.
        let words = unsafe {
            (self.last_error)(words.as_mut_ptr(), words.len());
            CStr::from_ptr(words.as_ptr())
        };
        let reason = format!("{what}: status {status}: {}", words.to_string_lossy().trim());
        Err(Error::Device { device: format!("cuDNN {}", self.version), reason })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: it was created, and every descriptor holds the library: none is left.
            let _ = unsafe { (self.close)(self.handle) };
        }
    }
}

/// Kinds of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Kind {
    Pointwise = 0,
    EngineConfig = 3,
    Heuristics = 4,
    Plan = 5,
    PointwiseOperation = 13,
    Graph = 15,
    VariantPack = 16,
    Tensor = 17,
    Matmul = 18,
    MatmulOperation = 19,
    Reduction = 21,
    ReductionOperation = 22,
    ReshapeOperation = 31,
}

/// Types of attributes.
mod of {
    pub(super) const HANDLE: i32 = 0;
    pub(super) const INT64: i32 = 3;
    pub(super) const POINTER: i32 = 6;
    pub(super) const DESCRIPTOR: i32 = 15;
}

/// An object of the backend API.
pub(super) struct Descriptor {
    library: Arc<Library>,
    raw: Opaque,
}

// SAFETY: it is changed by its owner alone, and read under the same mutex as the handle.
unsafe impl Send for Descriptor {}

impl Descriptor {
    pub(super) fn new(library: &Arc<Library>, kind: Kind) -> Result<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the object is written to `raw`.
        let status = unsafe { (library.create)(kind as i32, &mut raw) };
        library.check(status, &format!("a descriptor {kind:?}"))?;
        Ok(Self { library: library.clone(), raw })
    }

    fn put<T>(&mut self, attribute: i32, kind: i32, values: &[T]) -> Result<()> {
        // SAFETY: `kind` says the type of the values, which are copied.
        let status =
            unsafe { (self.library.set)(self.raw, attribute, kind, values.len() as i64, values.as_ptr().cast()) };
        self.library.check(status, &format!("attribute {attribute}"))
    }

    /// Sets integers.
    pub(super) fn ints(&mut self, attribute: i32, values: &[i64]) -> Result<()> {
        self.put(attribute, of::INT64, values)
    }

    /// Sets one value of an enumeration of the library, whose type is `kind`.
    pub(super) fn choice(&mut self, attribute: i32, kind: i32, value: i32) -> Result<()> {
        self.put(attribute, kind, &[value])
    }

    /// Sets a truth value.
    pub(super) fn flag(&mut self, attribute: i32, value: bool) -> Result<()> {
        const BOOLEAN: i32 = 2;
        self.put(attribute, BOOLEAN, &[value])
    }

    /// Sets pointers, which are kept and not followed.
    pub(super) fn pointers(&mut self, attribute: i32, values: &[*mut c_void]) -> Result<()> {
        self.put(attribute, of::POINTER, values)
    }

    /// Sets other objects.
    pub(super) fn parts<'a>(&mut self, attribute: i32, parts: impl IntoIterator<Item = &'a Self>) -> Result<()> {
        let raw: Vec<Opaque> = parts.into_iter().map(|part| part.raw).collect();
        self.put(attribute, of::DESCRIPTOR, &raw)
    }

    /// Sets the library's handle.
    pub(super) fn handle(&mut self, attribute: i32) -> Result<()> {
        let handle = self.library.handle;
        self.put(attribute, of::HANDLE, &[handle])
    }

    /// Ends the changes.
    pub(super) fn finish(self, what: &str) -> Result<Self> {
        // SAFETY: the object is alive.
        let status = unsafe { (self.library.finalize)(self.raw) };
        self.library.check(status, what)?;
        Ok(self)
    }

    /// An integer of a finished object.
    pub(super) fn int(&self, attribute: i32) -> Result<i64> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: one integer is asked for and written.
        let status = unsafe {
            (self.library.get)(self.raw, attribute, of::INT64, 1, &mut count, ptr::from_mut(&mut value).cast())
        };
        self.library.check(status, &format!("attribute {attribute}"))?;
        Ok(value)
    }

    /// The objects of kind `kind` that a finished object holds, `limit` at most.
    pub(super) fn held(&self, attribute: i32, kind: Kind, limit: usize) -> Result<Vec<Self>> {
        let mut found = (0..limit).map(|_| Self::new(&self.library, kind)).collect::<Result<Vec<_>>>()?;
        let mut raw: Vec<Opaque> = found.iter().map(|one| one.raw).collect();
        let mut count = 0i64;
        // SAFETY: as many objects as are asked for stand ready to be filled.
        let status = unsafe {
            (self.library.get)(self.raw, attribute, of::DESCRIPTOR, limit as i64, &mut count, raw.as_mut_ptr().cast())
        };
        self.library.check(status, &format!("attribute {attribute}"))?;
        found.truncate(usize::try_from(count).unwrap_or_default());
        Ok(found)
    }

    /// Runs the plan with a finished variant pack, behind what the stream was given before.
    pub(super) fn execute(&self, pack: &Self) -> Result<()> {
        // SAFETY: both are finished; the pack's pointers are those of tensors that the caller keeps.
        let status = unsafe { (self.library.execute)(self.library.handle, self.raw, pack.raw) };
        self.library.check(status, "attention")
    }

    /// The library it belongs to.
    pub(super) const fn library(&self) -> &Arc<Library> {
        &self.library
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed here alone.
        let _ = unsafe { (self.library.destroy)(self.raw) };
    }
}
