//! Making one token after another: `kernels/row_product.cu` compiled for a dtype, and `row_attention.cu` for a model's heads.

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{
    DType, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaFunction, CudaStream, sys},
    },
};
use pmetal_metal::{
    AttentionSpec, Decoding, Error, Reach, Recording, Result, RowAttention, RowProduct, RowStep, kernels::CUDA_PRELUDE,
    limits, pitch,
};

use super::{CudaGpu, kernels::element};

const PRODUCT: &str = concat!(
    include_str!("../../kernels/decoding.cuh"),
    "#line 1 \"row_product.cu\"\n",
    include_str!("../../kernels/row_product.cu")
);
const ATTENTION: &str = concat!(
    include_str!("../../kernels/decoding.cuh"),
    "#line 1 \"row_attention.cu\"\n",
    include_str!("../../kernels/row_attention.cu")
);

/// Warps of a product's block, and the chunks on their way to each, by measurement on an H200: enough to keep its memory busy, and too many for
/// two blocks of the next product on one multiprocessor.
const WARPS: usize = 16;
const DEPTH: usize = 2;
const CHUNK: usize = 4096;

/// Warps of an attention's block, and the blocks that share a head's keys: as many as a cluster has everywhere.
const ATTENTION_WARPS: usize = 8;
const SPLITS: usize = 8;

/// The widest group of queries of a key's head, in elements: what a thread can hold.
const WIDEST_GROUP: usize = 1024;

/// Bytes that are copied and read at once.
const VECTOR: usize = 16;

/// Bytes of shared memory that a kernel has beside those that it is told of.
const OWN: usize = 1024;

/// The kernels that were asked for, compiled.
#[derive(Default)]
pub(super) struct Kernels {
    products: RwLock<HashMap<DType, CudaFunction>>,
    attentions: RwLock<HashMap<Heads, CudaFunction>>,
}

/// What attention is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Heads {
    dtype: DType,
    /// Queries of a key's head.
    group: usize,
    head_dim: usize,
    /// Whether a query sees less than every key up to its own.
    limited: bool,
}

impl Heads {
    fn new(dtype: DType, spec: &AttentionSpec) -> Self {
        let whole = spec.softcap.is_none() && spec.kv_heads > 0 && spec.heads.is_multiple_of(spec.kv_heads);
        let group = if whole { spec.heads / spec.kv_heads } else { 0 };
        Self { dtype, group, head_dim: spec.head_dim, limited: spec.reach != Reach::All }
    }

    /// Whether the text can be compiled for it.
    fn fit(&self) -> bool {
        let bytes = self.head_dim * self.dtype.size_in_bytes();
        matches!(self.dtype, DType::F32 | DType::F16 | DType::BF16)
            && self.group > 0
            && bytes.is_multiple_of(VECTOR)
            && (bytes / VECTOR).is_power_of_two()
            && bytes <= 32 * VECTOR
            && self.group * self.head_dim <= WIDEST_GROUP
    }

    fn sizes(&self) -> [(&'static str, usize); 5] {
        [
            ("HEAD_DIM", self.head_dim),
            ("GROUP", self.group),
            ("LIMITED", usize::from(self.limited)),
            ("SPLITS", SPLITS),
            ("WARPS", ATTENTION_WARPS),
        ]
    }
}

/// What the product's text has the host define.
const PRODUCT_SIZES: [(&str, usize); 3] = [("WARPS", WARPS), ("DEPTH", DEPTH), ("CHUNK", CHUNK)];

/// A text for elements of a dtype, and the compiler's options.
fn source(text: &str, dtype: DType, sizes: &[(&str, usize)]) -> Result<(String, Vec<String>)> {
    let text = format!("{CUDA_PRELUDE}\ntypedef {} T;\n#line 1 \"decoding.cuh\"\n{text}", element(dtype)?);
    Ok((text, sizes.iter().map(|(name, value)| format!("-D{name}={value}u")).collect()))
}

/// Bytes of shared memory of a product's block: the row, and the rings.
fn shared_bytes(row: usize) -> usize {
    row.next_multiple_of(128) + WARPS * DEPTH * CHUNK
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// A launch that is ready.
struct Launch {
    function: CudaFunction,
    grid: [u32; 2],
    threads: u32,
    shared: u32,
    /// Whether the blocks of a row of the grid are a cluster.
    cluster: bool,
    /// The kernel's argument, a structure of no more words.
    words: [u64; 16],
}

struct Recorded {
    stream: Arc<CudaStream>,
    launches: Vec<Launch>,
}

impl Decoding for CudaGpu {
    fn decodes(&self, dtype: DType, spec: &AttentionSpec, widths: &[usize]) -> Result<bool> {
        // bulk copies, clusters and dependent launches came with Hopper
        let (major, _) = self.context.compute_capability().w()?;
        let (size, most) = (dtype.size_in_bytes(), self.shared_memory()?);
        let fits = |&width: &usize| (width * size).is_multiple_of(VECTOR) && shared_bytes(width * size) + OWN <= most;
        Ok(major >= 9 && Heads::new(dtype, spec).fit() && widths.iter().all(fits))
    }

    fn record(&self, steps: &[RowStep]) -> Result<Box<dyn Recording>> {
        let launches = steps.iter().map(|step| match step {
            RowStep::Product(product) => self.product_launch(product),
            RowStep::Attention(attention) => self.attention_launch(attention),
        });
        Ok(Box::new(Recorded { stream: self.stream.clone(), launches: launches.collect::<Result<_>>()? }))
    }
}

impl Recording for Recorded {
    fn replay(&self) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        self.launches.iter().try_for_each(|launch| launch.ask(&self.stream))
    }
}

impl Launch {
    /// Asks for it: it may begin before what is in front of it has ended, and waits by itself before it touches what that writes.
    fn ask(&self, stream: &CudaStream) -> Result<()> {
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let [x, y] = self.grid;
        let cluster =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: if self.cluster { x } else { 1 }, y: 1, z: 1 };
        let mut attributes = [
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            ),
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: cluster },
            ),
        ];
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: if self.cluster { 2 } else { 1 },
        };
        let mut words = self.words;
        let mut arguments: [*mut c_void; 1] = [ptr::from_mut(&mut words).cast()];
        // SAFETY: the kernel has one argument, a structure of no more than these words; the driver has copied it and the attributes when it
        // returns. Its operands were checked when it was recorded, and whoever keeps the recording keeps their memory.
        let asked = unsafe {
            sys::cuLaunchKernelEx(&config, self.function.cu_function(), arguments.as_mut_ptr(), ptr::null_mut())
        };
        Ok(asked.result().w()?)
    }
}

impl CudaGpu {
    fn product_kernel(&self, dtype: DType) -> Result<CudaFunction> {
        let products = &self.decoding.products;
        if let Some(function) = products.read().unwrap_or_else(PoisonError::into_inner).get(&dtype) {
            return Ok(function.clone());
        }
        let function = self.decoding_kernel("product", dtype, PRODUCT, &PRODUCT_SIZES)?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, self.shared_memory()?.saturating_sub(OWN) as i32).w()?;
        products.write().unwrap_or_else(PoisonError::into_inner).insert(dtype, function.clone());
        Ok(function)
    }

    fn attention_kernel(&self, heads: Heads) -> Result<CudaFunction> {
        let attentions = &self.decoding.attentions;
        if let Some(function) = attentions.read().unwrap_or_else(PoisonError::into_inner).get(&heads) {
            return Ok(function.clone());
        }
        let function = self.decoding_kernel("attend", heads.dtype, ATTENTION, &heads.sizes())?;
        attentions.write().unwrap_or_else(PoisonError::into_inner).insert(heads, function.clone());
        Ok(function)
    }

    fn decoding_kernel(&self, name: &str, dtype: DType, text: &str, sizes: &[(&str, usize)]) -> Result<CudaFunction> {
        let (text, options) = source(text, dtype, sizes)?;
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Ok(self.compile("decoding.cuh", &text, &options)?.load_function(name).w()?)
    }

    fn attention_launch(&self, attention: &RowAttention) -> Result<Launch> {
        let &RowAttention { qkv, head_norms, eps, inv_freq, position, keys, values, out, spec } = attention;
        let dtype = qkv.dtype();
        let kind = Heads::new(dtype, &spec);
        if !kind.fit() {
            return Err(misfit("qkv", "heads that the kernel takes".into(), qkv.dims()));
        }
        let AttentionSpec { heads, kv_heads, head_dim, scale, reach, .. } = spec;
        let [window, chunk] = limits(reach);
        let place = kv_heads * head_dim;
        expect("qkv", qkv, dtype, heads * head_dim + 2 * place)?;
        expect("out", out, dtype, heads * head_dim)?;
        expect("inv_freq", inv_freq, DType::F32, head_dim / 2)?;
        expect("position", position, DType::U32, 1)?;
        for (name, cache) in [("keys", keys), ("values", values)] {
            expect(name, cache, dtype, cache.elem_count() / place * place)?;
        }
        let mut norms = [0; 2];
        for (to, norm) in norms.iter_mut().zip(head_norms.into_iter().flatten()) {
            expect("head_norms", norm, dtype, head_dim)?;
            *to = self.address(norm)?;
        }
        let mut words = [0; 16];
        words[..11].copy_from_slice(&[
            self.aligned("qkv", qkv)?,
            norms[0],
            norms[1],
            self.address(inv_freq)?,
            self.address(position)?,
            self.aligned("keys", keys)?,
            self.aligned("values", values)?,
            self.address(out)?,
            pair(self.number(kv_heads)?, scale.to_bits()),
            pair(eps.to_bits(), window),
            pair(chunk, 0),
        ]);
        Ok(Launch {
            function: self.attention_kernel(kind)?,
            grid: [SPLITS as u32, self.number(kv_heads)?],
            threads: 32 * ATTENTION_WARPS as u32,
            shared: 0,
            cluster: true,
            words,
        })
    }

    fn product_launch(&self, product: &RowProduct) -> Result<Launch> {
        let RowProduct { weights, x, norm, bias, residual, gated, y } = product;
        let (dtype, k) = (x.dtype(), x.elem_count());
        if weights.is_empty() || weights.len() > 3 || *gated && weights.len() != 2 {
            return Err(misfit("weights", "one to three, of a gated product two".into(), &[weights.len()]));
        }
        if *gated && weights[0].dims() != weights[1].dims() {
            return Err(misfit("weights", "gate and up of one shape".into(), weights[1].dims()));
        }
        let (mut at, mut ends, mut pitches, mut rows) = ([0; 3], [0; 3], [0; 3], 0);
        for (i, weight) in weights.iter().enumerate() {
            let pitch = pitch(weight).filter(|pitch| (pitch * dtype.size_in_bytes()).is_multiple_of(VECTOR));
            let (n, width) = weight.dims2()?;
            let Some(pitch) = pitch.filter(|_| width == k && weight.dtype() == dtype) else {
                return Err(misfit("weights", format!("rows of {k} {dtype:?}"), weight.dims()));
            };
            rows += n;
            (at[i], pitches[i]) = (self.aligned("weights", weight)?, self.number(pitch)?);
            ends[i..].fill(self.number(rows)?);
        }
        let n = if *gated { rows / 2 } else { rows };
        let optional = |name, tensor: Option<&Tensor>, count| match tensor {
            None => Ok(0),
            Some(tensor) => expect(name, tensor, dtype, count).and_then(|()| self.aligned(name, tensor)),
        };
        if !(k * dtype.size_in_bytes()).is_multiple_of(VECTOR) {
            return Err(misfit("x", format!("a multiple of {VECTOR} bytes"), x.dims()));
        }
        expect("x", x, dtype, k)?;
        expect("y", y, if y.dtype() == DType::F32 { DType::F32 } else { dtype }, n)?;
        let mut words = [0; 16];
        words[..14].copy_from_slice(&[
            at[0],
            at[1],
            at[2],
            self.aligned("x", x)?,
            optional("norm", norm.map(|(weight, _)| weight), k)?,
            optional("bias", *bias, rows)?,
            optional("residual", *residual, n)?,
            self.address(y)?,
            pair(ends[0], ends[1]),
            pair(ends[2], pitches[0]),
            pair(pitches[1], pitches[2]),
            pair(self.number(n)?, self.number(k)?),
            pair((*gated).into(), (y.dtype() == DType::F32).into()),
            pair(norm.map_or(0.0, |(_, eps)| eps).to_bits(), 0),
        ]);
        let shared = shared_bytes(k * dtype.size_in_bytes());
        if shared + OWN > self.shared_memory()? {
            return Err(misfit("x", "a row that shared memory has room for".into(), x.dims()));
        }
        Ok(Launch {
            function: self.product_kernel(dtype)?,
            grid: [self.number(self.multiprocessors()?.min(n))?, 1],
            threads: 32 * WARPS as u32,
            shared: self.number(shared)?,
            cluster: false,
            words,
        })
    }

    /// The address of a tensor of contiguous rows that are read by whole vectors.
    fn aligned(&self, name: &'static str, tensor: &Tensor) -> Result<u64> {
        let address = self.address(tensor)?;
        if !address.is_multiple_of(VECTOR as u64) {
            return Err(misfit(name, format!("at a multiple of {VECTOR} bytes"), tensor.dims()));
        }
        Ok(address)
    }

    fn multiprocessors(&self) -> Result<usize> {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    }

    /// Bytes of shared memory that a block may have.
    fn shared_memory(&self) -> Result<usize> {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<usize> {
        Ok(self.context.attribute(attribute).w()? as usize)
    }

    fn number(&self, n: usize) -> Result<u32> {
        u32::try_from(n).map_err(|_| self.refuse(format!("{n} is too large for a kernel")))
    }
}

/// That a tensor is contiguous and has so many elements of a dtype.
fn expect(name: &'static str, tensor: &Tensor, dtype: DType, count: usize) -> Result<()> {
    if tensor.dtype() != dtype || tensor.elem_count() != count || !tensor.is_contiguous() {
        return Err(misfit(name, format!("{count} {dtype:?}, contiguous"), tensor.dims()));
    }
    Ok(())
}

fn misfit(buffer: &'static str, expected: String, got: &[usize]) -> Error {
    Error::Buffer { kernel: "decoding", buffer, expected, got: format!("{got:?}") }
}
