//! What is checked: each operation on small inputs of even and odd sizes, and on one of realistic size for its time.

use candle_core::{DType, Device, Tensor};

use super::{
    compare::{random, rounding},
    prepare::{self, attention, losses},
};
use crate::{Arena, Result, Value, place::gpu_of};

/// A check of one operation.
pub(super) struct Operation {
    /// What [`crate::switch_off`] knows it by.
    pub op: &'static str,
    /// In reports.
    pub name: &'static str,
    /// Whose kernels stay out of it.
    pub without: Option<&'static str>,
    /// Whether the CPU has kernels for it.
    pub on_cpu: bool,
    pub dtypes: &'static [DType],
    pub tolerance: fn(DType) -> f64,
    /// Sizes to compare at.
    pub sizes: &'static [Size],
    /// The size to time at, on a GPU.
    pub timed: Size,
    /// Makes it ready to compute.
    pub prepare: fn(&Run, Size) -> Result<Prepared>,
}

/// Tokens and their width, or what stands for them.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub rows: usize,
    pub width: usize,
}

const fn size(rows: usize, width: usize) -> Size {
    Size { rows, width }
}

/// Outputs out of leaves.
pub(super) type Forward = Box<dyn Fn(&[Value]) -> Result<Vec<Value>>>;

/// An operation with its inputs in place.
pub(super) struct Prepared {
    /// Inputs whose gradients are wanted.
    pub leaves: Vec<Value>,
    /// Parameters whose gradients are wanted.
    pub arena: Option<Arena>,
    /// Computes the outputs. What works in place gives its result in the first call alone.
    pub forward: Forward,
}

/// Where a check computes, and in what.
pub(super) struct Run<'a> {
    pub device: &'a Device,
    /// The dtype of activations; f64 for the reference.
    pub dtype: DType,
    /// All inputs are rounded to this first, so that the reference sees the same.
    pub rounded: DType,
}

impl Run<'_> {
    pub fn is_reference(&self) -> bool {
        self.dtype == DType::F64
    }

    pub fn tensor_of(&self, shape: &[usize], seed: u64, dtype: DType) -> Result<Tensor> {
        let rounded = random(shape, seed)?.to_dtype(self.rounded)?;
        Ok(rounded.to_dtype(dtype)?.to_device(self.device)?)
    }

    pub fn tensor(&self, shape: &[usize], seed: u64) -> Result<Tensor> {
        self.tensor_of(shape, seed, self.dtype)
    }

    /// As [`Run::tensor`]; on a GPU a column range of a wider matrix.
    pub fn columns(&self, [rows, width]: [usize; 2], seed: u64) -> Result<Tensor> {
        let tensor = self.tensor(&[rows, width], seed)?;
        if !self.on_gpu()? {
            return Ok(tensor);
        }
        let beside = Tensor::ones((rows, 8), self.dtype, self.device)?;
        Ok(Tensor::cat(&[&beside, &tensor, &beside], 1)?.narrow(1, 8, width)?)
    }

    fn on_gpu(&self) -> Result<bool> {
        Ok(gpu_of(self.device)?.is_some() && !self.is_reference())
    }

    pub fn variables(&self, shapes: &[&[usize]]) -> Result<Vec<Value>> {
        shapes.iter().zip(1..).map(|(shape, seed)| Ok(Value::variable(self.tensor(shape, seed)?))).collect()
    }

    /// Parameters as the device's operations take them: f32 on a CPU, in the dtype of activations on a GPU.
    pub fn arena(&self, shapes: &[(&str, &[usize])]) -> Result<Arena> {
        self.arena_in(if self.on_gpu()? { self.dtype } else { DType::F32 }, shapes)
    }

    pub fn arena_in(&self, dtype: DType, shapes: &[(&str, &[usize])]) -> Result<Arena> {
        let named: Vec<_> = shapes.iter().map(|(name, shape)| (name.to_string(), (*shape).into())).collect();
        let arena = Arena::new(&named, dtype, self.device)?;
        for (param, seed) in arena.params().zip(20..) {
            param.set(&self.tensor_of(param.value().dims(), seed, DType::F32)?)?;
        }
        Ok(arena)
    }
}

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];
/// Rows to a SIMD group and to a threadgroup, in fours and not.
const ROWS: &[Size] = &[size(5, 24), size(3, 17), size(2, 1030)];
const FEW: &[Size] = &[size(5, 24), size(4, 18)];
const HEADS: &[Size] = &[size(41, 64), size(36, 128), size(40, 256)];
/// Many tiles of whatever kernel a device has.
const LONG: &[Size] = &[size(800, 64), size(800, 128), size(500, 256)];
pub(super) const LONG_ROWS: &str = "attention on matrix units, long";
pub(super) const LONG_WINDOWS: &str = "attention on matrix units, long windows";
/// 2,048 tokens of width 1,024.
const TIMED: Size = size(2048, 1024);

const COMMON: Operation = Operation {
    op: "",
    name: "",
    without: None,
    on_cpu: true,
    dtypes: FLOATS,
    tolerance: rounding,
    sizes: ROWS,
    timed: TIMED,
    prepare: prepare::norm,
};

/// Every check, in the order of reports.
pub(super) const ALL: &[Operation] = &[
    Operation { op: "rms_norm", name: "rms_norm", prepare: prepare::norm, ..COMMON },
    Operation { op: "rms_norm", name: "add_rms_norm", prepare: prepare::add_norm, ..COMMON },
    Operation { op: "rms_norm", name: "norms with an offset", prepare: prepare::norms_with_offset, ..COMMON },
    Operation { op: "layer_norm", name: "layer_norm", prepare: prepare::layer, ..COMMON },
    Operation { op: "layer_norm", name: "layer_norm of heads", prepare: prepare::layer_of_heads, ..COMMON },
    Operation {
        op: "rope",
        name: "rope",
        sizes: &[size(5, 6), size(4, 64), size(3, 256)],
        timed: size(2048, 64),
        prepare: prepare::turn,
        ..COMMON
    },
    Operation {
        op: "rope",
        name: "rope of a part, neighbours",
        sizes: &[size(5, 6), size(4, 64), size(3, 160)],
        timed: size(2048, 64),
        prepare: prepare::turn_neighbours,
        ..COMMON
    },
    Operation {
        op: "rms_norm_rope",
        name: "rms_norm_rope with an offset",
        sizes: &[size(5, 6), size(4, 64), size(3, 256)],
        timed: size(2048, 64),
        prepare: prepare::norm_with_offset_and_turn,
        ..COMMON
    },
    Operation {
        op: "rms_norm_rope",
        name: "rms_norm_rope",
        sizes: &[size(5, 6), size(4, 64), size(3, 256)],
        timed: size(2048, 64),
        prepare: prepare::norm_and_turn,
        ..COMMON
    },
    Operation { op: "gated_activation", name: "swiglu", prepare: prepare::gate, ..COMMON },
    Operation { op: "gated_activation", name: "geglu", prepare: prepare::gelu_gate, ..COMMON },
    Operation { op: "gated_activation", name: "clamped gate", prepare: prepare::clamped_gate, ..COMMON },
    Operation { op: "row_sums", name: "rows of experts", prepare: prepare::rows_of_experts, ..COMMON },
    Operation { op: "parts", name: "parts of rows and columns", tolerance: exact, prepare: prepare::parts, ..COMMON },
    Operation { op: "normal", name: "random numbers", prepare: prepare::random_numbers, ..COMMON },
    Operation { op: "embedding", name: "embedding", prepare: prepare::look_up, ..COMMON },
    Operation { op: "linear", name: "linear with LoRA", sizes: FEW, prepare: prepare::low_rank, ..COMMON },
    Operation {
        op: "linear",
        name: "linear with LoRA and dropout",
        sizes: FEW,
        prepare: prepare::low_rank_with_dropout,
        ..COMMON
    },
    Operation { op: "linear", name: "linear", sizes: FEW, prepare: prepare::trained_linear, ..COMMON },
    Operation { op: "linear_cross_entropy", name: "linear_cross_entropy", sizes: FEW, prepare: losses::loss, ..COMMON },
    Operation {
        op: "linear_cross_entropy",
        name: "linear_cross_entropy, evaluation",
        sizes: FEW,
        prepare: losses::losses,
        ..COMMON
    },
    Operation {
        op: "linear_cross_entropy",
        name: "linear_cross_entropy, capped",
        sizes: FEW,
        prepare: losses::capped_loss,
        ..COMMON
    },
    Operation {
        op: "linear_cross_entropy",
        name: "linear_cross_entropy, capped, evaluation",
        sizes: FEW,
        prepare: losses::capped_losses,
        ..COMMON
    },
    Operation { op: "scaled", name: "scaled", prepare: prepare::factors, ..COMMON },
    Operation { op: "logits", name: "logits", sizes: FEW, tolerance: of_f32, prepare: losses::head, ..COMMON },
    Operation { prepare: attention::packed, ..PLAIN_ATTENTION },
    Operation { name: "attention, rows in a cache", prepare: attention::cached, ..PLAIN_ATTENTION },
    Operation {
        name: "attention, decoding",
        sizes: &[size(600, 64), size(130, 128)],
        prepare: attention::decoding,
        ..PLAIN_ATTENTION
    },
    Operation { name: "attention, windows and sinks", prepare: attention::windowed, ..PLAIN_ATTENTION },
    Operation { name: "attention, chunks in a cache", prepare: attention::chunked, ..PLAIN_ATTENTION },
    Operation {
        name: "attention, decoding in a window",
        sizes: &[size(600, 64), size(130, 128)],
        prepare: attention::windowed_decoding,
        ..PLAIN_ATTENTION
    },
    Operation { name: "attention on matrix units", prepare: attention::packed, ..MATRIX_ATTENTION },
    Operation { name: "attention on matrix units, windows", prepare: attention::windowed, ..MATRIX_ATTENTION },
    Operation { name: "attention on matrix units, chunks", prepare: attention::chunked, ..MATRIX_ATTENTION },
    Operation { name: "attention on matrix units, cache", prepare: attention::cached, ..MATRIX_ATTENTION },
    Operation { name: LONG_ROWS, sizes: LONG, prepare: attention::long, ..MATRIX_ATTENTION },
    Operation { name: LONG_WINDOWS, sizes: LONG, prepare: attention::long_windowed, ..MATRIX_ATTENTION },
    Operation { op: "write_rows", name: "write_rows", tolerance: exact, prepare: prepare::write, ..COMMON },
    Operation { op: "elementwise", name: "sums", prepare: prepare::sums, ..COMMON },
    Operation { op: "elementwise", name: "conversions", prepare: prepare::conversions, ..COMMON },
    Operation { op: "elementwise", name: "biases", prepare: prepare::biases, ..COMMON },
    Operation { op: "elementwise", name: "dropout", prepare: prepare::dropout, ..COMMON },
    Operation {
        op: "adamw",
        name: "adamw",
        tolerance: of_f32,
        timed: size(2048, 2048),
        prepare: prepare::optimizer,
        ..COMMON
    },
    Operation {
        op: "sampler",
        name: "sampler",
        on_cpu: false,
        dtypes: &[DType::F32],
        tolerance: exact,
        sizes: &[size(1, 5), size(1, 5003)],
        timed: size(1, 151_936),
        prepare: prepare::sample,
        ..COMMON
    },
];

const PLAIN_ATTENTION: Operation = Operation {
    op: "attention",
    name: "attention",
    without: Some("attention_matrix"),
    tolerance: of_attention,
    sizes: HEADS,
    timed: size(2048, 128),
    ..COMMON
};
pub(super) const MATRIX_ATTENTION: Operation =
    Operation { op: "attention_matrix", without: None, on_cpu: false, ..PLAIN_ATTENTION };

/// Whatever is wrong in the last place of f32, in results that are never rounded to less.
fn of_f32(_: DType) -> f64 {
    rounding(DType::F32)
}

/// The exponentials of scores carry the scores' rounding.
fn of_attention(dtype: DType) -> f64 {
    rounding(dtype).max(1e-4)
}

fn exact(_: DType) -> f64 {
    0.0
}
