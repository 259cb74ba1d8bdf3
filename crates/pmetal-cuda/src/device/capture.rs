//! Steps as CUDA graphs.

use std::ptr;

use candle_core::{
    Device,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{
            CudaGraph,
            sys::{self, CUgraphInstantiate_flags, CUgraphNodeType, CUstreamCaptureMode},
        },
    },
};
use pmetal_metal::{Error, Result};

use super::{CudaGpu, cuda};

/// What was captured, ready to be run again.
pub struct Graph {
    graph: CudaGraph,
}

impl Graph {
    /// Asks for all that was captured, on the same memory, behind what was asked for before. What it needed from the pool when it was
    /// captured is its own.
    pub fn replay(&self) -> Result<()> {
        Ok(self.graph.launch().w()?)
    }
}

/// Runs `f` once as it is, which compiles its kernels and chooses its products, then once more to capture what it asks of `device`: that
/// second run computes nothing until [`Graph::replay`].
///
/// What `f` leaves behind goes into tensors that were made before; a tensor made in `f` is dropped in it, and one made before is not.
/// Numbers of the host are those of the first run, in every replay.
///
/// # Errors
/// Where `f` fails, waits for the device (reads a number back) or breaks these rules.
pub fn capture<E: From<Error>>(device: &Device, mut f: impl FnMut() -> Result<(), E>) -> Result<Graph, E> {
    let Device::Cuda(device) = device else {
        let hint = "graphs are captured on CUDA devices alone";
        return Err(Error::NotBuilt { device: "a graph", hint }.into());
    };
    let gpu = cuda(device)?;
    // uploads of the first run stay on the device for the second, which could not make them
    let _uploads = device.enable_cuda_graph_htod_cache();
    f()?;
    gpu.begin()?;
    let done = f();
    let graph = gpu.end();
    done?;
    Ok(Graph { graph: graph? })
}

impl CudaGpu {
    fn begin(&self) -> Result<()> {
        self.stream.synchronize().w()?;
        self.pool.trim()?;
        Ok(self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?)
    }

    fn end(&self) -> Result<CudaGraph> {
        // an error of giving memory back is met here: nothing else reports it
        let freed = self.context.check_err();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        let graph = freed.and(graph).map_err(|error| {
            self.refuse(format!(
                "the step cannot be captured: it waits for the GPU, or drops a tensor made before ({error})"
            ))
        })?;
        let graph = graph.ok_or_else(|| self.refuse("nothing was captured".into()))?;
        let (made, dropped) = memory_nodes(graph.cu_graph())?;
        if made != dropped {
            return Err(self.refuse(format!("{} tensors made in the captured step outlive it", made.abs_diff(dropped))));
        }
        Ok(graph)
    }

    pub(super) fn refuse(&self, reason: String) -> Error {
        Error::Device { device: self.name(), reason }
    }
}

/// How many nodes take memory, and how many give it back.
fn memory_nodes(graph: sys::CUgraph) -> Result<(usize, usize)> {
    let mut count = 0;
    // SAFETY: the graph is alive; without a place for nodes, their number is written.
    unsafe { sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut count) }.result().w()?;
    let mut nodes = vec![ptr::null_mut(); count];
    // SAFETY: there is place for as many nodes as it said.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result().w()?;
    let (mut made, mut dropped) = (0, 0);
    for node in nodes {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: the node is one of a graph that is alive; its kind is written.
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result().w()?;
        match kind {
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC => made += 1,
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_FREE => dropped += 1,
            _ => {}
        }
    }
    Ok((made, dropped))
}
