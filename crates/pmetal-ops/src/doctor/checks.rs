//! What is checked: each operation on small inputs of even and odd sizes, and on one of realistic size for its time.

use candle_core::{DType, Device, Tensor};

use super::compare::{random, rounding};
use crate::{
    AdamW, Adapter, Arena, AttentionSpec, LinearGroup, LinearMember, Result, RopeTable, Rows, Sampler, Sampling, Value,
    Weight, adamw, add_rms_norm, attention, elementwise, embedding, linear_cross_entropy, logits, no_grad,
    place::gpu_of, rms_norm, rope, swiglu, write_rows,
};

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

/// An operation with its inputs in place.
pub(super) struct Prepared {
    /// Inputs whose gradients are wanted.
    pub leaves: Vec<Value>,
    /// Parameters whose gradients are wanted.
    pub arena: Option<Arena>,
    /// Computes the outputs. What works in place gives its result in the first call alone.
    pub forward: Box<dyn Fn(&[Value]) -> Result<Vec<Value>>>,
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
    fn is_reference(&self) -> bool {
        self.dtype == DType::F64
    }

    fn tensor_of(&self, shape: &[usize], seed: u64, dtype: DType) -> Result<Tensor> {
        let rounded = random(shape, seed)?.to_dtype(self.rounded)?;
        Ok(rounded.to_dtype(dtype)?.to_device(self.device)?)
    }

    fn tensor(&self, shape: &[usize], seed: u64) -> Result<Tensor> {
        self.tensor_of(shape, seed, self.dtype)
    }

    fn variables(&self, shapes: &[&[usize]]) -> Result<Vec<Value>> {
        shapes.iter().zip(1..).map(|(shape, seed)| Ok(Value::variable(self.tensor(shape, seed)?))).collect()
    }

    /// Parameters as the device's operations take them: f32 on a CPU, in the dtype of activations on a GPU.
    fn arena(&self, shapes: &[(&str, &[usize])]) -> Result<Arena> {
        let is_gpu = gpu_of(self.device)?.is_some() && !self.is_reference();
        self.arena_in(if is_gpu { self.dtype } else { DType::F32 }, shapes)
    }

    fn arena_in(&self, dtype: DType, shapes: &[(&str, &[usize])]) -> Result<Arena> {
        let named: Vec<_> = shapes.iter().map(|(name, shape)| (name.to_string(), (*shape).into())).collect();
        let arena = Arena::new(&named, dtype, self.device)?;
        for (param, seed) in arena.params().zip(20..) {
            param.set(&self.tensor_of(param.value().dims(), seed, DType::F32)?)?;
        }
        Ok(arena)
    }
}

fn weight(arena: &Arena, name: &str) -> Result<Weight> {
    let param = arena.param(name).ok_or_else(|| crate::Error::NoSuchParam(name.into()))?;
    Ok(Weight::Trainable(param))
}

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];
/// Rows to a SIMD group and to a threadgroup, in fours and not.
const ROWS: &[Size] = &[size(5, 24), size(3, 17), size(2, 1030)];
const FEW: &[Size] = &[size(5, 24), size(4, 18)];
const HEADS: &[Size] = &[size(41, 64), size(40, 128)];
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
    prepare: norm,
};

/// Every check, in the order of reports.
pub(super) const ALL: &[Operation] = &[
    Operation { op: "rms_norm", name: "rms_norm", prepare: norm, ..COMMON },
    Operation { op: "rms_norm", name: "add_rms_norm", prepare: add_norm, ..COMMON },
    Operation {
        op: "rope",
        name: "rope",
        sizes: &[size(5, 6), size(4, 64)],
        timed: size(2048, 64),
        prepare: turn,
        ..COMMON
    },
    Operation { op: "swiglu", name: "swiglu", prepare: gate, ..COMMON },
    Operation { op: "embedding", name: "embedding", prepare: look_up, ..COMMON },
    Operation { op: "linear", name: "linear with LoRA", sizes: FEW, prepare: low_rank, ..COMMON },
    Operation { op: "linear", name: "linear", sizes: FEW, prepare: trained_linear, ..COMMON },
    Operation { op: "linear_cross_entropy", name: "linear_cross_entropy", sizes: FEW, prepare: loss, ..COMMON },
    Operation {
        op: "linear_cross_entropy",
        name: "linear_cross_entropy, evaluation",
        sizes: FEW,
        prepare: losses,
        ..COMMON
    },
    Operation { op: "logits", name: "logits", sizes: FEW, tolerance: of_f32, prepare: head, ..COMMON },
    Operation { prepare: packed, ..PLAIN_ATTENTION },
    Operation { name: "attention, rows in a cache", prepare: cached, ..PLAIN_ATTENTION },
    Operation {
        name: "attention, decoding",
        sizes: &[size(600, 64), size(530, 128)],
        prepare: decoding,
        ..PLAIN_ATTENTION
    },
    Operation { name: "attention on matrix units", prepare: packed, ..MATRIX_ATTENTION },
    Operation { name: "attention on matrix units, cache", prepare: cached, ..MATRIX_ATTENTION },
    Operation { op: "write_rows", name: "write_rows", tolerance: exact, prepare: write, ..COMMON },
    Operation { op: "elementwise", name: "sums", prepare: sums, ..COMMON },
    Operation { op: "elementwise", name: "conversions", prepare: conversions, ..COMMON },
    Operation { op: "elementwise", name: "biases", prepare: biases, ..COMMON },
    Operation { op: "elementwise", name: "dropout", prepare: dropout, ..COMMON },
    Operation { op: "adamw", name: "adamw", tolerance: of_f32, timed: size(2048, 2048), prepare: optimizer, ..COMMON },
    Operation {
        op: "sampler",
        name: "sampler",
        on_cpu: false,
        dtypes: &[DType::F32],
        tolerance: exact,
        sizes: &[size(1, 5), size(1, 5003)],
        timed: size(1, 151_936),
        prepare: sample,
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

fn prepared(leaves: Vec<Value>, forward: impl Fn(&[Value]) -> Result<Vec<Value>> + 'static) -> Result<Prepared> {
    Ok(Prepared { leaves, arena: None, forward: Box::new(forward) })
}

fn norm(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = run.variables(&[&[rows, width], &[width]])?;
    prepared(leaves, |v| Ok(vec![rms_norm(&v[0], &v[1], 1e-5)?]))
}

fn add_norm(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = run.variables(&[&[rows, width], &[rows, width], &[width]])?;
    prepared(leaves, |v| {
        let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], 1e-5)?;
        Ok(vec![sum, y])
    })
}

fn turn(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let positions: Vec<u32> = (0..rows as u32).map(|t| t % 700).collect();
    let frequencies: Vec<f32> = (0..width / 2).map(|i| 0.7f32.powi(i as i32)).collect();
    let table = RopeTable::new(&positions, &frequencies, 1.2);
    prepared(run.variables(&[&[rows, 16, width]])?, move |v| Ok(vec![rope(&v[0], &table)?]))
}

fn gate(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = run.variables(&[&[rows, width], &[rows, width]])?;
    prepared(leaves, |v| Ok(vec![swiglu(&v[0], &v[1])?]))
}

fn look_up(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    // some ids come up often, some never
    let vocab = rows + 3;
    let ids: Vec<u32> = (0..2 * rows).map(|i| (i * i % vocab) as u32).collect();
    let arena = run.arena(&[("before", &[3]), ("table", &[vocab, width])])?;
    let (table, dtype, device) = (weight(&arena, "table")?, run.dtype, run.device.clone());
    let forward = move |_: &[Value]| Ok(vec![embedding(&ids, &table, dtype, &device)?]);
    Ok(Prepared { leaves: vec![], arena: Some(arena), forward: Box::new(forward) })
}

/// A frozen weight with bias and adapter, dropout in front of it.
fn low_rank(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let rank = 16.min(width / 3);
    let arena = run.arena(&[("bias", &[width]), ("a", &[rank, width]), ("b", &[width, rank])])?;
    let (a, b) = (weight(&arena, "a")?, weight(&arena, "b")?);
    let member = LinearMember {
        weight: Weight::Frozen(run.tensor(&[width, width], 9)?),
        bias: Some(weight(&arena, "bias")?),
        adapter: Some(Adapter { a, b, scale: 1.5, dropout: 0.1, place: 7 }),
    };
    let group = LinearGroup { members: vec![member] };
    let leaves = run.variables(&[&[rows, width]])?;
    Ok(Prepared { leaves, arena: Some(arena), forward: Box::new(move |v| group.forward(&v[0], Some(3))) })
}

fn trained_linear(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let arena = run.arena(&[("w", &[width, width])])?;
    let members = vec![LinearMember { weight: weight(&arena, "w")?, bias: None, adapter: None }];
    let leaves = run.variables(&[&[rows, width]])?;
    let group = LinearGroup { members };
    Ok(Prepared { leaves, arena: Some(arena), forward: Box::new(move |v| group.forward(&v[0], None)) })
}

/// The vocabulary of checks of the loss.
fn vocabulary(rows: usize) -> usize {
    (2 * rows).max(37)
}

/// A label for each token; of an odd number of tokens some are not counted.
fn labels(rows: usize) -> Vec<i64> {
    let vocab = vocabulary(rows);
    (0..rows).map(|t| if rows % 2 == 1 && t % 3 == 1 { -100 } else { (t * 7 % vocab) as i64 }).collect()
}

fn loss(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let arena = run.arena(&[("head", &[vocabulary(rows), width])])?;
    let (head, labels) = (weight(&arena, "head")?, labels(rows));
    let forward = move |v: &[Value]| {
        let found = linear_cross_entropy(&v[0], &head, &labels, 1.0 / labels.len() as f32)?;
        Ok(vec![found.loss, Value::constant(found.token_losses)])
    };
    Ok(Prepared { leaves: run.variables(&[&[rows, width]])?, arena: Some(arena), forward: Box::new(forward) })
}

fn losses(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let head = Weight::Frozen(run.tensor(&[vocabulary(rows), width], 2)?);
    let (hidden, labels) = (Value::constant(run.tensor(&[rows, width], 1)?), labels(rows));
    prepared(vec![], move |_| {
        let found = no_grad(|| linear_cross_entropy(&hidden, &head, &labels, 1.0 / labels.len() as f32))?;
        Ok(vec![found.loss, Value::constant(found.token_losses)])
    })
}

fn head(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (hidden, head) = (run.tensor(&[rows, width], 1)?, run.tensor(&[vocabulary(rows), width], 2)?);
    let is_reference = run.is_reference();
    prepared(vec![], move |_| {
        let y = if is_reference { hidden.matmul(&head.t()?)? } else { logits(&hidden, &Weight::Frozen(head.clone()))? };
        Ok(vec![Value::constant(y)])
    })
}

/// Two query heads share a key head.
fn attention_spec(rows: usize, width: usize) -> AttentionSpec {
    let heads = if rows < 1024 { 4 } else { 16 };
    AttentionSpec { heads, kv_heads: heads / 2, head_dim: width, scale: 1.0 / (width as f32).sqrt() }
}

fn attend(run: &Run, rows: Rows, [queries, keys]: [usize; 2], spec: AttentionSpec) -> Result<Prepared> {
    let AttentionSpec { heads, kv_heads, head_dim, .. } = spec;
    let kv = [keys, kv_heads, head_dim];
    let leaves = run.variables(&[&[queries, heads, head_dim], &kv, &kv])?;
    prepared(leaves, move |v| Ok(vec![attention(&v[0], &v[1], &v[2], &rows, spec)?]))
}

/// Rows of different lengths behind one another, one of them a single token.
fn packed(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let first = rows / 5;
    let lengths = Rows::packed(&[first, 1, rows - first - 1]);
    attend(run, lengths, [rows, rows], attention_spec(rows, width))
}

/// Rows that go on from what a cache holds.
fn cached(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let queries = [rows / 4, 1, rows / 3];
    let lengths = Rows::cached(&queries, &[rows, rows / 2, rows / 3], rows + 2);
    attend(run, lengths, [queries.iter().sum(), 3 * (rows + 2)], attention_spec(rows, width))
}

/// One new token a row.
fn decoding(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    attend(run, Rows::cached(&[1, 1], &[rows, rows / 3], rows), [2, 2 * rows], attention_spec(rows, width))
}

fn write(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let places = 2 * rows;
    let (x, target) = (run.tensor(&[rows, width], 1)?, run.tensor(&[places, width], 2)?);
    // one run of places, then several beside it
    let scattered = [(places - 1, 1), (0, 0), (rows, rows - 1)];
    prepared(vec![], move |_| {
        write_rows(&x, &target, &[(0, rows)])?;
        write_rows(&x, &target, &scattered)?;
        Ok(vec![Value::constant(target.clone())])
    })
}

fn sums(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (x, y) = (run.tensor(&[rows, width], 1)?, run.tensor(&[rows, width], 2)?);
    let wide = if run.is_reference() { DType::F64 } else { DType::F32 };
    let sum = run.tensor_of(&[rows, width], 3, wide)?;
    prepared(vec![], move |_| {
        elementwise::add_assign(&y, &x)?;
        elementwise::add_assign(&sum, &x)?;
        Ok(vec![Value::constant(y.clone()), Value::constant(sum.clone())])
    })
}

fn conversions(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let x = run.tensor(&[rows, width], 1)?;
    let [same, wide, narrow] =
        [x.dtype(), DType::F32, x.dtype()].map(|dtype| pmetal_metal::empty(x.shape(), dtype, x.device()));
    let (same, wide, narrow) = (same?, wide?, narrow?);
    prepared(vec![], move |_| {
        elementwise::convert_into(&x, &same)?;
        elementwise::convert_into(&x, &wide)?;
        elementwise::convert_into(&wide, &narrow)?;
        Ok([&same, &wide, &narrow].map(|y| Value::constant(y.clone())).into())
    })
}

fn biases(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (y, bias) = (run.tensor(&[rows, width], 1)?, run.tensor(&[width], 2)?);
    let grad = run.tensor_of(&[width], 3, DType::F32)?;
    prepared(vec![], move |_| {
        elementwise::bias_grad(&y, &grad)?;
        elementwise::bias_add(&y, &bias)?;
        Ok(vec![Value::constant(y.clone()), Value::constant(grad.clone())])
    })
}

fn dropout(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let x = run.tensor(&[rows, width], 1)?;
    prepared(vec![], move |_| Ok(vec![Value::constant(elementwise::dropout(&x, 1 << 40 | 77, 0.3)?)]))
}

/// A step on parameters that have a copy in the dtype, clipped. Values, moments, and how far the copies lie from the values' rounding.
fn optimizer(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let arena = run.arena_in(run.rounded, &[("first", &[3]), ("rest", &[rows * width])])?;
    let grads = [run.tensor_of(&[3], 1, DType::F32)?, run.tensor_of(&[rows * width], 2, DType::F32)?];
    let loss = Tensor::new(1f32, run.device)?;
    let config = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1 };
    prepared(vec![], move |_| {
        for (param, grad) in arena.params().zip(&grads) {
            param.add_grad(grad)?;
        }
        adamw(&arena, &config, 1.0, &loss)?;
        let mut outputs: Vec<Tensor> = (0..3).map(|row| arena.state().get(row)).collect::<candle_core::Result<_>>()?;
        if let Some(copies) = arena.copies() {
            outputs.push((outputs[0].to_dtype(copies.dtype())? - copies)?);
        }
        Ok(outputs.into_iter().map(Value::constant).collect())
    })
}

/// Tokens of answers under different settings.
fn sample(run: &Run, Size { width: vocab, .. }: Size) -> Result<Prepared> {
    const PLAIN: Sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 4 };
    let settings = [
        Sampling { temperature: 0.0, repetition_penalty: 1.3, ..PLAIN },
        Sampling { temperature: 0.7, top_k: 50, top_p: 0.8, min_p: 0.02, repetition_penalty: 1.2, ..PLAIN },
        Sampling { top_p: 0.95, ..PLAIN },
    ];
    let logits = (run.tensor_of(&[vocab], 1, DType::F32)? * 4.0)?;
    let prompt: Vec<u32> = (0..20).map(|i| (i * i % vocab) as u32).collect();
    prepared(vec![], move |_| {
        let mut tokens = Vec::new();
        for sampling in settings {
            let mut sampler = Sampler::new(sampling, &prompt);
            for _ in 0..2 {
                tokens.push(sampler.sample(&logits)?.unwrap_or(u32::MAX));
            }
        }
        Ok(vec![Value::constant(Tensor::new(tokens, &Device::Cpu)?)])
    })
}
