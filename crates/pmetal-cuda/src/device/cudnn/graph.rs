//! Graphs of cuDNN's primitive operations, and plans that run them.

use std::{ffi::c_void, sync::Arc};

use pmetal_metal::{Error, Result};

use super::library::{Descriptor, Kind, Library};

/// Types of a tensor's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub(super) enum Number {
    F32 = 0,
    F16 = 2,
    I32 = 4,
    Bf16 = 9,
    I64 = 10,
    Bool = 11,
}

/// Pointwise operations.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(super) enum Pointwise {
    Add = 0,
    Mul = 1,
    Div = 6,
    Sub = 9,
    Exp = 13,
    Log = 15,
    Identity = 21,
    Tanh = 101,
    Greater = 302,
    GreaterOrEqual = 303,
    Less = 304,
    And = 400,
    /// The index along an axis.
    Index = 501,
    /// The first where the third is true, else the second.
    Select = 601,
}

/// Reductions.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub(super) enum Reduction {
    Add = 0,
    Max = 3,
}

/// A tensor of a graph: its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node(usize);

impl Node {
    /// What a variant pack calls it.
    pub(super) const fn uid(self) -> i64 {
        self.0 as i64 + 1
    }
}

/// Four dimensions and their strides, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) dims: [i64; 4],
    pub(super) strides: [i64; 4],
}

impl Layout {
    /// Contiguous.
    pub(super) const fn plain(dims: [i64; 4]) -> Self {
        let [_, b, c, d] = dims;
        Self { dims, strides: [b * c * d, c * d, d, 1] }
    }

    /// The last two dimensions exchanged.
    pub(super) const fn transposed(self) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (self.dims, self.strides);
        Self { dims: [a, b, d, c], strides: [e, f, h, g] }
    }
}

/// What a graph knows of a tensor.
struct Tensor {
    descriptor: Descriptor,
    layout: Layout,
    ragged: Option<Node>,
}

/// A graph in the making.
pub(super) struct Graph {
    library: Arc<Library>,
    tensors: Vec<Tensor>,
    operations: Vec<Descriptor>,
}

impl Graph {
    pub(super) const fn new(library: Arc<Library>) -> Self {
        Self { library, tensors: Vec::new(), operations: Vec::new() }
    }

    /// A tensor that the caller provides. A ragged one's rows begin where the tensor `ragged` says, in elements.
    pub(super) fn tensor(&mut self, number: Number, layout: Layout, ragged: Option<Node>) -> Result<Node> {
        self.add(number, layout, ragged, Place::Memory)
    }

    /// A number that is read on the host when the plan runs.
    pub(super) fn scalar(&mut self, number: Number) -> Result<Node> {
        self.add(number, Layout::plain([1; 4]), None, Place::Host)
    }

    /// What only this graph's operations see.
    pub(super) fn hidden(&mut self, number: Number, layout: Layout) -> Result<Node> {
        self.add(number, layout, None, Place::Nowhere)
    }

    fn descriptor(&self, node: Node) -> &Descriptor {
        &self.tensors[node.0].descriptor
    }

    fn add(&mut self, number: Number, layout: Layout, ragged: Option<Node>, place: Place) -> Result<Node> {
        let node = Node(self.tensors.len());
        let mut tensor = Descriptor::new(&self.library, Kind::Tensor)?;
        tensor.choice(attribute::TENSOR_DATA_TYPE, attribute::OF_DATA_TYPE, number as i32)?;
        tensor.ints(attribute::TENSOR_DIMENSIONS, &layout.dims)?;
        tensor.ints(attribute::TENSOR_STRIDES, &layout.strides)?;
        tensor.ints(attribute::TENSOR_UNIQUE_ID, &[node.uid()])?;
        tensor.ints(attribute::TENSOR_BYTE_ALIGNMENT, &[16])?;
        tensor.flag(attribute::TENSOR_IS_VIRTUAL, place == Place::Nowhere)?;
        tensor.flag(attribute::TENSOR_IS_BY_VALUE, place == Place::Host)?;
        if let Some(offsets) = ragged {
            tensor.parts(attribute::TENSOR_RAGGED_OFFSET_DESC, [self.descriptor(offsets)])?;
        }
        self.tensors.push(Tensor { descriptor: tensor.finish("a tensor")?, layout, ragged });
        Ok(node)
    }

    /// A pointwise operation on one to three tensors into `output`, computed in `number`; `axis` for an index.
    pub(super) fn pointwise_into(
        &mut self,
        mode: Pointwise,
        number: Number,
        axis: Option<i64>,
        inputs: &[Node],
        output: Node,
    ) -> Result<()> {
        let mut form = Descriptor::new(&self.library, Kind::Pointwise)?;
        form.choice(attribute::POINTWISE_MODE, attribute::OF_POINTWISE_MODE, mode as i32)?;
        form.choice(attribute::POINTWISE_MATH_PREC, attribute::OF_DATA_TYPE, number as i32)?;
        if let Some(axis) = axis {
            form.ints(attribute::POINTWISE_AXIS, &[axis])?;
        }
        let form = form.finish("a pointwise form")?;
        let mut operation = Descriptor::new(&self.library, Kind::PointwiseOperation)?;
        operation.parts(attribute::POINTWISE_FORM, [&form])?;
        let places = [attribute::POINTWISE_X, attribute::POINTWISE_B, attribute::POINTWISE_T];
        for (&input, place) in inputs.iter().zip(places) {
            operation.parts(place, [self.descriptor(input)])?;
        }
        operation.parts(attribute::POINTWISE_Y, [self.descriptor(output)])?;
        self.operations.push(operation.finish(&format!("pointwise {mode:?}"))?);
        Ok(())
    }

    /// The same into a new tensor laid out as the first input, of numbers `number`.
    pub(super) fn pointwise(&mut self, mode: Pointwise, number: Number, inputs: &[Node]) -> Result<Node> {
        let output = self.hidden(number, self.tensors[inputs[0].0].layout)?;
        self.pointwise_into(mode, number, None, inputs, output)?;
        Ok(output)
    }

    /// The index along `axis`, laid out as `like` and computed in `number`.
    pub(super) fn index(&mut self, like: Node, number: Number, axis: i64) -> Result<Node> {
        let output = self.hidden(Number::I32, self.tensors[like.0].layout)?;
        self.pointwise_into(Pointwise::Index, number, Some(axis), &[like], output)?;
        Ok(output)
    }

    /// The same, computed and kept in `number`.
    pub(super) fn index_kept(&mut self, like: Node, number: Number, axis: i64) -> Result<Node> {
        let output = self.hidden(number, self.tensors[like.0].layout)?;
        self.pointwise_into(Pointwise::Index, number, Some(axis), &[like], output)?;
        Ok(output)
    }

    /// A truth value for each element of `a`.
    pub(super) fn compare(&mut self, mode: Pointwise, a: Node, b: Node) -> Result<Node> {
        self.pointwise(mode, Number::Bool, &[a, b])
    }

    /// `x` reduced to the shape of `output`, in f32.
    pub(super) fn reduce(&mut self, mode: Reduction, x: Node, output: Node) -> Result<()> {
        let mut form = Descriptor::new(&self.library, Kind::Reduction)?;
        form.choice(attribute::REDUCTION_OPERATOR, attribute::OF_REDUCTION, mode as i32)?;
        form.choice(attribute::REDUCTION_COMP_TYPE, attribute::OF_DATA_TYPE, Number::F32 as i32)?;
        let form = form.finish("a reduction's form")?;
        let mut operation = Descriptor::new(&self.library, Kind::ReductionOperation)?;
        operation.parts(attribute::REDUCTION_FORM, [&form])?;
        operation.parts(attribute::REDUCTION_X, [self.descriptor(x)])?;
        operation.parts(attribute::REDUCTION_Y, [self.descriptor(output)])?;
        self.operations.push(operation.finish(&format!("reduction {mode:?}"))?);
        Ok(())
    }

    /// `x` seen as `layout` and as `number`, its rows where they were.
    pub(super) fn reshaped(&mut self, x: Node, number: Number, layout: Layout) -> Result<Node> {
        let output = self.add(number, layout, self.tensors[x.0].ragged, Place::Nowhere)?;
        let mut operation = Descriptor::new(&self.library, Kind::ReshapeOperation)?;
        operation.parts(attribute::RESHAPE_X, [self.descriptor(x)])?;
        operation.parts(attribute::RESHAPE_Y, [self.descriptor(output)])?;
        self.operations.push(operation.finish("a reshape")?);
        Ok(output)
    }

    /// `c = a · b` in f32, batch by batch; `lengths` holds how much of m, n and k counts in each.
    pub(super) fn matmul(&mut self, a: Node, b: Node, c: Node, lengths: [Option<Node>; 3]) -> Result<()> {
        let mut form = Descriptor::new(&self.library, Kind::Matmul)?;
        form.choice(attribute::MATMUL_COMP_TYPE, attribute::OF_DATA_TYPE, Number::F32 as i32)?;
        let form = form.finish("a product's form")?;
        let mut operation = Descriptor::new(&self.library, Kind::MatmulOperation)?;
        for (place, node) in [(attribute::MATMUL_A, a), (attribute::MATMUL_B, b), (attribute::MATMUL_C, c)] {
            operation.parts(place, [self.descriptor(node)])?;
        }
        operation.parts(attribute::MATMUL_FORM, [&form])?;
        let places = [attribute::MATMUL_M, attribute::MATMUL_N, attribute::MATMUL_K];
        for (place, node) in places.into_iter().zip(lengths) {
            if let Some(node) = node {
                operation.parts(place, [self.descriptor(node)])?;
            }
        }
        self.operations.push(operation.finish("a product")?);
        Ok(())
    }

    /// The plan that the library thinks fastest.
    ///
    /// # Errors
    /// The library's words where it has no kernel for the graph.
    pub(super) fn plan(self) -> Result<Plan> {
        /// How many of the library's proposals are tried.
        const PROPOSALS: usize = 8;
        let mut graph = Descriptor::new(&self.library, Kind::Graph)?;
        graph.parts(attribute::GRAPH_OPS, &self.operations)?;
        graph.handle(attribute::GRAPH_HANDLE)?;
        let graph = graph.finish("a graph")?;
        let mut heuristics = Descriptor::new(&self.library, Kind::Heuristics)?;
        heuristics.parts(attribute::HEURISTICS_GRAPH, [&graph])?;
        heuristics.choice(attribute::HEURISTICS_MODE, attribute::OF_HEURISTICS, attribute::HEURISTICS_A)?;
        let heuristics = heuristics.finish("heuristics")?;
        let mut last = Error::Device { device: "cuDNN".into(), reason: "it proposes no kernel".into() };
        for config in heuristics.held(attribute::HEURISTICS_RESULTS, Kind::EngineConfig, PROPOSALS)? {
            match Plan::new(&self.library, &config) {
                Ok(plan) => return Ok(plan),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// Where a tensor is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Memory,
    Host,
    Nowhere,
}

/// A graph that can run.
pub(super) struct Plan {
    plan: Descriptor,
    /// Bytes of scratch memory that it needs.
    pub(super) workspace: usize,
}

impl Plan {
    fn new(library: &Arc<Library>, config: &Descriptor) -> Result<Self> {
        let mut plan = Descriptor::new(library, Kind::Plan)?;
        plan.handle(attribute::PLAN_HANDLE)?;
        plan.parts(attribute::PLAN_ENGINE_CONFIG, [config])?;
        let plan = plan.finish("a plan")?;
        let workspace = usize::try_from(plan.int(attribute::PLAN_WORKSPACE_SIZE)?).unwrap_or_default();
        Ok(Self { plan, workspace })
    }

    /// Runs the plan on the pointers of `tensors`, those of scalars being on the host.
    pub(super) fn run(&self, tensors: &[(Node, *mut c_void)], workspace: *mut c_void) -> Result<()> {
        let (uids, pointers): (Vec<i64>, Vec<_>) = tensors.iter().map(|&(node, at)| (node.uid(), at)).unzip();
        let mut pack = Descriptor::new(self.plan.library(), Kind::VariantPack)?;
        pack.ints(attribute::PACK_UNIQUE_IDS, &uids)?;
        pack.pointers(attribute::PACK_DATA_POINTERS, &pointers)?;
        pack.pointers(attribute::PACK_WORKSPACE, &[workspace])?;
        self.plan.execute(&pack.finish("a variant pack")?)
    }
}

/// Names of attributes (`CUDNN_ATTR_…`) and of their types (`CUDNN_TYPE_…`).
mod attribute {
    pub(super) const OF_DATA_TYPE: i32 = 1;
    pub(super) const OF_HEURISTICS: i32 = 8;
    pub(super) const OF_POINTWISE_MODE: i32 = 14;
    pub(super) const OF_REDUCTION: i32 = 18;

    pub(super) const POINTWISE_MODE: i32 = 0;
    pub(super) const POINTWISE_MATH_PREC: i32 = 1;
    pub(super) const POINTWISE_AXIS: i32 = 9;
    pub(super) const HEURISTICS_MODE: i32 = 200;
    pub(super) const HEURISTICS_GRAPH: i32 = 201;
    pub(super) const HEURISTICS_RESULTS: i32 = 202;
    /// The mode: the library's model of its kernels' speed.
    pub(super) const HEURISTICS_A: i32 = 3;
    pub(super) const PLAN_HANDLE: i32 = 400;
    pub(super) const PLAN_ENGINE_CONFIG: i32 = 401;
    pub(super) const PLAN_WORKSPACE_SIZE: i32 = 402;
    pub(super) const POINTWISE_FORM: i32 = 750;
    pub(super) const POINTWISE_X: i32 = 751;
    pub(super) const POINTWISE_B: i32 = 752;
    pub(super) const POINTWISE_Y: i32 = 753;
    pub(super) const POINTWISE_T: i32 = 758;
    pub(super) const GRAPH_HANDLE: i32 = 800;
    pub(super) const GRAPH_OPS: i32 = 801;
    pub(super) const TENSOR_BYTE_ALIGNMENT: i32 = 900;
    pub(super) const TENSOR_DATA_TYPE: i32 = 901;
    pub(super) const TENSOR_DIMENSIONS: i32 = 902;
    pub(super) const TENSOR_STRIDES: i32 = 903;
    pub(super) const TENSOR_UNIQUE_ID: i32 = 906;
    pub(super) const TENSOR_IS_VIRTUAL: i32 = 907;
    pub(super) const TENSOR_IS_BY_VALUE: i32 = 908;
    pub(super) const TENSOR_RAGGED_OFFSET_DESC: i32 = 913;
    pub(super) const PACK_UNIQUE_IDS: i32 = 1000;
    pub(super) const PACK_DATA_POINTERS: i32 = 1001;
    pub(super) const PACK_WORKSPACE: i32 = 1003;
    pub(super) const MATMUL_COMP_TYPE: i32 = 1500;
    pub(super) const MATMUL_A: i32 = 1520;
    pub(super) const MATMUL_B: i32 = 1521;
    pub(super) const MATMUL_C: i32 = 1522;
    pub(super) const MATMUL_FORM: i32 = 1523;
    pub(super) const MATMUL_M: i32 = 1525;
    pub(super) const MATMUL_N: i32 = 1526;
    pub(super) const MATMUL_K: i32 = 1527;
    pub(super) const REDUCTION_OPERATOR: i32 = 1600;
    pub(super) const REDUCTION_COMP_TYPE: i32 = 1601;
    pub(super) const REDUCTION_X: i32 = 1610;
    pub(super) const REDUCTION_Y: i32 = 1611;
    pub(super) const REDUCTION_FORM: i32 = 1612;
    pub(super) const RESHAPE_X: i32 = 2200;
    pub(super) const RESHAPE_Y: i32 = 2201;
}
