//! Tensors that rest in the host's memory: copies on a stream of their own, ordered with the device's by events, into page-locked buffers that
//! are reused.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    DType, Device, Shape, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys},
    },
};
use pmetal_metal::{Error, Resting, Result, empty};

use super::{CudaGpu, cuda};

/// The stream of the copies, and the buffers that nothing rests in.
pub(super) struct Host {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    free: Mutex<HashMap<usize, Vec<Buffer>>>,
}

/// Page-locked memory of the host.
struct Buffer(*mut c_void);

// SAFETY: an address that only the driver reads and writes.
unsafe impl Send for Buffer {}

impl Host {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self { context: context.clone(), stream: context.new_stream().w()?, free: Mutex::default() })
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = free.get_mut(&bytes).and_then(Vec::pop) {
            return Ok(buffer);
        }
        self.context.bind_to_thread().w()?;
        // SAFETY: nothing reads it before a copy has written it.
        let buffer = unsafe { result::malloc_host(bytes, 0) };
        Ok(Buffer(buffer.map_err(|error| Error::Device {
            device: "the host".into(),
            reason: format!("no {bytes} bytes of page-locked memory for what leaves the GPU ({error})"),
        })?))
    }

    /// Takes a buffer back: the next copy into it comes behind those out of it, on the one stream that all copies are on.
    fn give_back(&self, bytes: usize, buffer: Buffer) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).entry(bytes).or_default().push(buffer);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // nothing to do about an error: the process gives everything back in the end
        let _ = self.stream.synchronize();
        let free = self.free.get_mut().unwrap_or_else(PoisonError::into_inner);
        for buffer in free.drain().flat_map(|(_, buffers)| buffers) {
            // SAFETY: it came from `malloc_host`, and no copy is under way.
            let _ = unsafe { result::free_host(buffer.0) };
        }
    }
}

/// A tensor whose numbers are in a buffer, or about to be.
struct Rested {
    host: Arc<Host>,
    device: Device,
    /// The device's own stream.
    stream: Arc<CudaStream>,
    buffer: Option<Buffer>,
    bytes: usize,
    shape: Shape,
    dtype: DType,
    /// On the device, and the end of the copy from it or to it.
    here: Option<(Tensor, CudaEvent)>,
}

impl CudaGpu {
    /// Starts the copy of a tensor to the host, behind all that was asked for before.
    pub(super) fn rested(&self, host: &Arc<Host>, tensor: &Tensor) -> Result<Box<dyn Resting>> {
        let tensor = tensor.contiguous()?;
        let (shape, dtype) = (tensor.shape().clone(), tensor.dtype());
        let bytes = shape.elem_count() * dtype.size_in_bytes();
        let buffer = host.buffer(bytes)?;
        let from = self.address(&tensor)?;
        host.stream.join(&self.stream).w()?;
        // SAFETY: tensor and buffer are `bytes` long; both live until the event behind the copy has been waited for.
        unsafe { sys::cuMemcpyDtoHAsync_v2(buffer.0, from, bytes, host.stream.cu_stream()) }.result().w()?;
        let here = Some((tensor, host.stream.record_event(None).w()?));
        let (device, stream) = (Device::Cuda(self.device.clone()), self.stream.clone());
        Ok(Box::new(Rested { host: host.clone(), device, stream, buffer: Some(buffer), bytes, shape, dtype, here }))
    }
}

impl Rested {
    /// The tensor behind the copy from or to it.
    fn settled(&mut self) -> Result<Option<Tensor>> {
        let Some((tensor, copied)) = self.here.take() else { return Ok(None) };
        self.stream.wait(&copied).w()?;
        Ok(Some(tensor))
    }
}

impl Resting for Rested {
    fn leave(&mut self) -> Result<()> {
        self.settled().map(drop)
    }

    fn recall(&mut self) -> Result<()> {
        if self.here.is_some() {
            return Ok(());
        }
        let Some(buffer) = &self.buffer else { return Ok(()) };
        let tensor = empty(self.shape.clone(), self.dtype, &self.device)?;
        let Device::Cuda(device) = &self.device else { return Ok(()) };
        let to = cuda(device)?.address(&tensor)?;
        // its memory may have been another tensor's until here
        self.host.stream.join(&self.stream).w()?;
        // SAFETY: as of the copy to the host.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to, buffer.0, self.bytes, self.host.stream.cu_stream()) }.result().w()?;
        self.here = Some((tensor, self.host.stream.record_event(None).w()?));
        Ok(())
    }

    fn take(mut self: Box<Self>) -> Result<Tensor> {
        self.recall()?;
        self.settled()?
            .ok_or_else(|| Error::Device { device: "the host".into(), reason: "what rested there is gone".into() })
    }
}

impl Drop for Rested {
    fn drop(&mut self) {
        // the tensor's memory must not be given to another before the copy is done
        let _ = self.settled();
        if let Some(buffer) = self.buffer.take() {
            self.host.give_back(self.bytes, buffer);
        }
    }
}
