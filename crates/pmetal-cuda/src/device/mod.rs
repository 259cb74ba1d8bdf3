//! A CUDA device: candle's, its one stream, and what runs on it.

mod attention;
#[cfg(test)]
mod attention_case;
mod capture;
mod cross_entropy;
mod cudnn;
mod decoding;
mod gemm;
mod host;
mod kernels;
mod low_rank;
mod marks;
mod memory;
mod nvrtc;
mod place;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    sync::{
        Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use candle_core::{
    CudaDevice, Device, Storage, Tensor,
    cuda_backend::{
        CudaStorageSlice, DeviceId, WrapErr,
        cudarc::driver::{CudaContext, CudaModule, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys},
    },
};
use pmetal_metal::{
    AttentionRows, AttentionSpec, Call, Decoding, Error, Facts, Gemm, Gpu, LowRankBackward, Marks, Memory, Part,
    PartTable, Resting, Result, Statistics, low_rank_inputs, low_rank_outputs,
};

use self::cudnn::Cudnn;

pub use capture::{Graph, capture};
pub use memory::is_out_of_memory;

/// CUDA device `ordinal`, with a stream of its own. It is opened once: a second stream's work would not be ordered with the first one's.
///
/// # Errors
/// Without such a GPU or its driver: what is missing, and what to do.
pub fn open(ordinal: usize) -> Result<Device> {
    static OPEN: Mutex<BTreeMap<usize, CudaDevice>> = Mutex::new(BTreeMap::new());
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = open.get(&ordinal) {
        return Ok(Device::Cuda(device.clone()));
    }
    let device = CudaDevice::new_with_stream(ordinal).map_err(|error| Error::Device {
        device: format!("CUDA device {ordinal}"),
        reason: missing(ordinal, memory::driver_error(&error)).unwrap_or_else(|| error.to_string()),
    })?;
    // its workspaces are there before anything is measured or captured
    gpu(&device)?;
    open.insert(ordinal, device.clone());
    Ok(Device::Cuda(device))
}

fn missing(ordinal: usize, error: Option<DriverError>) -> Option<String> {
    Some(match error?.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => "the driver sees no GPU: check nvidia-smi, or use --device cpu".into(),
        sys::CUresult::CUDA_ERROR_INVALID_DEVICE => match result::device::get_count() {
            Ok(1) => "there is one GPU, number 0".into(),
            Ok(count) => format!("there are {count} GPUs, numbers 0 to {}", count - 1),
            Err(_) => format!("there is no GPU of number {ordinal}"),
        },
        sys::CUresult::CUDA_ERROR_STUB_LIBRARY
        | sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | sys::CUresult::CUDA_ERROR_SYSTEM_NOT_READY
        | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "NVIDIA's driver does not answer or is too old: install one for this CUDA, or use --device cpu".into()
        }
        _ => return None,
    })
}

static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// Whether every run is to give the same bits; to be said before the first operation. Without it the fastest way of a product is chosen by
/// measuring, which may end differently the next time, and cuDNN adds up gradients in the order in which they come.
pub fn deterministic(on: bool) {
    DETERMINISTIC.store(on, Relaxed);
}

/// The device as operations use it: made once, then looked up.
pub fn gpu(device: &CudaDevice) -> Result<Arc<dyn Gpu>> {
    Ok(cuda(device)?)
}

fn cuda(device: &CudaDevice) -> Result<Arc<CudaGpu>> {
    static GPUS: LazyLock<RwLock<HashMap<DeviceId, Arc<CudaGpu>>>> = LazyLock::new(Default::default);
    if let Some(gpu) = GPUS.read().unwrap_or_else(PoisonError::into_inner).get(&device.id()) {
        return Ok(gpu.clone());
    }
    let mut gpus = GPUS.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = gpus.get(&device.id()) {
        return Ok(gpu.clone());
    }
    let gpu = Arc::new(CudaGpu::new(device)?);
    gpus.insert(device.id(), gpu.clone());
    Ok(gpu)
}

/// A CUDA device.
pub(crate) struct CudaGpu {
    device: CudaDevice,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    pool: memory::Pool,
    kernels: kernels::Kernels,
    cross_entropy: cross_entropy::CrossEntropy,
    products: gemm::Products,
    attention: attention::Attention,
    low_rank: low_rank::LowRank,
    placing: place::Placing,
    decoding: decoding::Kernels,
    /// Opened when it is first asked for; none where the machine has none.
    cudnn: OnceLock<Option<Cudnn>>,
    /// Made when a tensor first leaves for the host.
    host: OnceLock<Arc<host::Host>>,
}

impl CudaGpu {
    fn new(device: &CudaDevice) -> Result<Self> {
        let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
        if major < 8 {
            let reason = format!("its compute capability is {major}.{minor}, of at least 8.0 needed; use --device cpu");
            return Err(Error::Device { device: "CUDA".into(), reason });
        }
        // SAFETY: all work on the device is asked of this one stream, in order; the events that candle would record between streams order
        // nothing, and a capture cannot hold them.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        let pool = memory::Pool::new(&context)?;
        let products = gemm::Products::new(&stream)?;
        let low_rank = low_rank::LowRank::new(&context)?;
        Ok(Self {
            device: device.clone(),
            context,
            stream,
            pool,
            kernels: Default::default(),
            cross_entropy: Default::default(),
            products,
            attention: Default::default(),
            low_rank,
            placing: Default::default(),
            decoding: Default::default(),
            cudnn: OnceLock::new(),
            host: OnceLock::new(),
        })
    }

    /// Compiles CUDA C++ for this device; `name` stands in messages.
    ///
    /// # Errors
    /// The compiler's words where it refuses the text.
    pub(crate) fn compile(&self, name: &str, text: &str, options: &[&str]) -> Result<Arc<CudaModule>> {
        nvrtc::compile(&self.context, name, text, options)
    }

    /// Where the elements of a contiguous tensor begin on this device. Reading and writing there from kernels is right under a shared
    /// borrow: no Rust reference ever points to device memory, the stream orders all that touches it, and memory that is given back is
    /// given back in the stream's order, behind the kernels that were launched before.
    ///
    /// # Errors
    /// Where the tensor is not on this device.
    pub(crate) fn address(&self, tensor: &Tensor) -> Result<sys::CUdeviceptr> {
        fn start<T>(slice: &CudaSlice<T>) -> sys::CUdeviceptr {
            slice.device_ptr(slice.stream()).0
        }
        let (storage, layout) = tensor.storage_and_layout();
        let storage = match &*storage {
            Storage::Cuda(storage) if storage.device.id() == self.device.id() => storage,
            _ => {
                let reason = format!("a tensor is on another device: {:?}", tensor.device());
                return Err(Error::Device { device: self.name(), reason });
            }
        };
        let first = match &storage.slice {
            CudaStorageSlice::U8(slice) => start(slice),
            CudaStorageSlice::U32(slice) => start(slice),
            CudaStorageSlice::I16(slice) => start(slice),
            CudaStorageSlice::I32(slice) => start(slice),
            CudaStorageSlice::I64(slice) => start(slice),
            CudaStorageSlice::BF16(slice) => start(slice),
            CudaStorageSlice::F16(slice) => start(slice),
            CudaStorageSlice::F32(slice) => start(slice),
            CudaStorageSlice::F64(slice) => start(slice),
            CudaStorageSlice::F8E4M3(slice) => start(slice),
            CudaStorageSlice::F6E2M3(slice)
            | CudaStorageSlice::F6E3M2(slice)
            | CudaStorageSlice::F4(slice)
            | CudaStorageSlice::F8E8M0(slice) => start(slice),
        };
        Ok(first + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
    }

    /// cuDNN, where the machine has it.
    fn cudnn(&self) -> Option<&Cudnn> {
        // what keeps it from being opened keeps nothing from being computed
        let open = || Cudnn::open(self, DETERMINISTIC.load(Relaxed)).ok().flatten();
        self.cudnn.get_or_init(open).as_ref()
    }

    fn name(&self) -> String {
        format!("CUDA device {}", self.context.ordinal())
    }
}

impl Gpu for CudaGpu {
    fn launch(&self, call: &Call) -> Result<()> {
        if self.cross_entropy.launch(self, call)? {
            return Ok(());
        }
        self.kernels.launch(self, call)
    }

    fn gemm(&self, product: &Gemm) -> Result<()> {
        self.products.run(self, product)
    }

    fn low_rank_backward(&self, work: &LowRankBackward) -> Result<()> {
        if !self.low_rank.outputs(self, work)? {
            low_rank_outputs(self, work)?;
        }
        low_rank_inputs(self, work)
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
        if Cudnn::pays(q.dim(0)?, rows, spec)
            && let Some(cudnn) = self.cudnn()
            && let Some(stats) = cudnn.forward(self, [q, k, v], out, rows, spec)?
        {
            return Ok(Some(Statistics::Natural(stats)));
        }
        Ok(self.attention.forward(self, [q, k, v], out, rows, spec)?.map(Statistics::Binary))
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
        // what cuDNN did forward, it does backward
        if Cudnn::pays(qkv[0].dim(0)?, rows, spec)
            && let Some(cudnn) = self.cudnn()
            && cudnn.backward(self, dout, qkv, out, stats, grads, rows, spec)?
        {
            return Ok(());
        }
        self.attention.backward(self, dout, qkv, out, stats, grads, rows, spec)
    }

    fn rest(&self, tensor: &Tensor) -> Result<Option<Box<dyn Resting>>> {
        let host = match self.host.get() {
            Some(host) => host,
            None => {
                let host = Arc::new(host::Host::new(&self.context)?);
                self.host.get_or_init(|| host)
            }
        };
        self.rested(host, tensor).map(Some)
    }

    fn decoding(&self) -> Option<&dyn Decoding> {
        Some(self)
    }

    fn part_table(&self, parts: &[Part]) -> Result<Option<PartTable>> {
        place::table(self, parts)
    }

    fn place(&self, values: &Tensor, table: &PartTable) -> Result<()> {
        self.placing.run(self, values, table)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(self.stream.synchronize().w()?)
    }

    fn memory(&self) -> Result<Memory> {
        self.pool.memory(&self.context)
    }

    fn reset_peak(&self) -> Result<()> {
        self.pool.reset_peak()
    }

    fn facts(&self) -> Facts {
        let mut features = Vec::new();
        if let Ok((major, minor)) = self.context.compute_capability() {
            features.push(format!("compute capability {major}.{minor}"));
        }
        let processors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        if let Ok(count) = self.context.attribute(processors) {
            features.push(format!("{count} multiprocessors"));
        }
        if let Ok(bytes) = self.context.total_mem() {
            features.push(format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)));
        }
        if let Ok(version) = nvrtc::version() {
            features.push(format!("NVRTC {version}"));
        }
        features.push(format!("cuBLASLt {}", gemm::version()));
        features.push(match self.cudnn() {
            Some(cudnn) => format!("cuDNN {}", cudnn.version()),
            None => "no cuDNN".into(),
        });
        Facts { name: self.context.name().unwrap_or_else(|_| self.name()), driver: driver(), features }
    }

    fn marks(&self) -> Result<Box<dyn Marks>> {
        Ok(Box::new(marks::EventMarks::new(&self.stream)))
    }
}

/// The driver's version where the system tells it, and the newest CUDA that it runs.
fn driver() -> String {
    let mut version = 0;
    // SAFETY: it writes one integer.
    let cuda = match unsafe { sys::cuDriverGetVersion(&mut version) }.result() {
        Ok(()) => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
        Err(_) => "unknown".into(),
    };
    match fs::read_to_string("/sys/module/nvidia/version") {
        Ok(driver) => format!("{} ({cuda})", driver.trim()),
        Err(_) => cuda,
    }
}
