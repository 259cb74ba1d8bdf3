//! How each check makes its operation ready: inputs in place, gradients wanted or not.

pub(super) mod attention;
pub(super) mod losses;

use candle_core::{DType, Device, Tensor};

use super::checks::{Prepared, Run, Size};
use crate::{
    Activation, AdamW, Adapter, Arena, LinearGroup, LinearMember, Result, RmsNorm, RopeLayout, RopeTable, Sampler,
    Sampling, Value, Weight, adamw, add_rms_norm, combine_rows, elementwise, embedding, gated_activation, gather_rows,
    join_columns, join_rows, layer_norm, normal_on_gpu, random, rms_norm, rms_norm_rope, rope, scaled, scaled_rows,
    split_columns, split_rows, write_rows,
};

fn weight(arena: &Arena, name: &str) -> Result<Weight> {
    let param = arena.param(name).ok_or_else(|| crate::Error::NoSuchParam(name.into()))?;
    Ok(Weight::Trainable(param))
}

fn prepared(leaves: Vec<Value>, forward: impl Fn(&[Value]) -> Result<Vec<Value>> + 'static) -> Result<Prepared> {
    Ok(Prepared { leaves, arena: None, forward: Box::new(forward) })
}

/// Columns that are left free behind the rows of a result.
const SPARE: usize = 16;

pub(super) fn norm(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = [run.columns([rows, width], 1)?, run.tensor(&[width], 2)?].map(Value::variable);
    prepared(leaves.into(), |v| Ok(vec![rms_norm(&v[0], &v[1], RmsNorm::new(1e-5), 0)?]))
}

pub(super) fn add_norm(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let operands = [run.columns([rows, width], 1)?, run.tensor(&[rows, width], 2)?, run.tensor(&[width], 3)?];
    prepared(operands.map(Value::variable).into(), |v| {
        let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], RmsNorm::new(1e-5), SPARE)?;
        Ok(vec![sum, y])
    })
}

/// What a checkpoint holds is above 1, and is rounded with the product alone.
const WITH_OFFSET: RmsNorm = RmsNorm { eps: 1e-5, weight_offset: 1.0, rounds_first: false };

/// The norm of a value, and of its sum with another.
pub(super) fn norms_with_offset(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let operands = [run.columns([rows, width], 1)?, run.tensor(&[rows, width], 2)?, run.tensor(&[width], 3)?];
    prepared(operands.map(Value::variable).into(), |v| {
        let alone = rms_norm(&v[0], &v[2], WITH_OFFSET, 0)?;
        let (sum, y) = add_rms_norm(&v[0], &v[1], &v[2], WITH_OFFSET, SPARE)?;
        Ok(vec![alone, sum, y])
    })
}

pub(super) fn layer(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = [run.columns([rows, width], 1)?, run.tensor(&[width], 2)?, run.tensor(&[width], 3)?];
    prepared(leaves.map(Value::variable).into(), move |v| Ok(vec![layer_norm(&v[0], &v[1], Some(&v[2]), 1e-5, width)?]))
}

/// Each head has a weight of its own, or all share one.
pub(super) fn layer_of_heads(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = [run.columns([rows, 3 * width], 1)?, run.tensor(&[3 * width], 2)?, run.tensor(&[width], 3)?];
    prepared(leaves.map(Value::variable).into(), move |v| {
        Ok(vec![layer_norm(&v[0], &v[1], None, 1e-5, width)?, layer_norm(&v[0], &v[2], None, 1e-5, width)?])
    })
}

pub(super) fn turn(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let table = angles(rows, width);
    let leaves = vec![Value::variable(run.columns([rows, 16 * width], 1)?)];
    prepared(leaves, move |v| Ok(vec![rope(&v[0], &table)?]))
}

/// Heads wider than what turns of them, by pairs of neighbours.
pub(super) fn turn_neighbours(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let layout = RopeLayout { head_dim: 2 * width - 1, start: width - 2, interleaved: true };
    let table = angles_of(rows, width, layout);
    let leaves = vec![Value::variable(run.columns([rows, 8 * layout.head_dim], 1)?)];
    prepared(leaves, move |v| Ok(vec![rope(&v[0], &table)?]))
}

pub(super) fn norm_and_turn(run: &Run, size: Size) -> Result<Prepared> {
    norm_of_heads_and_turn(RmsNorm::new(1e-5), run, size)
}

pub(super) fn norm_with_offset_and_turn(run: &Run, size: Size) -> Result<Prepared> {
    norm_of_heads_and_turn(WITH_OFFSET, run, size)
}

fn norm_of_heads_and_turn(norm: RmsNorm, run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let table = angles(rows, width);
    let leaves = [run.columns([rows, 16 * width], 1)?, run.tensor(&[width], 2)?].map(Value::variable);
    prepared(leaves.into(), move |v| Ok(vec![rms_norm_rope(&v[0], &v[1], norm, &table)?]))
}

fn angles(tokens: usize, width: usize) -> RopeTable {
    angles_of(tokens, width, RopeLayout::whole(width))
}

fn angles_of(tokens: usize, width: usize, layout: RopeLayout) -> RopeTable {
    let positions: Vec<u32> = (0..tokens as u32).map(|t| t % 700).collect();
    let frequencies: Vec<f32> = (0..width / 2).map(|i| 0.7f32.powi(i as i32)).collect();
    RopeTable::new(&positions, &frequencies, 1.2, layout)
}

pub(super) fn gate(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    gate_of(Activation::Silu, run, [rows, width])
}

pub(super) fn gelu_gate(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    gate_of(Activation::GeluTanh, run, [rows, width])
}

/// With numbers on both sides of the limit, which is none of sixteen bits.
pub(super) fn clamped_gate(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    gate_of(Activation::Clamped { alpha: 1.702, limit: 0.7003 }, run, [rows, width])
}

/// Rows gathered for two experts each, then added up with weights.
pub(super) fn rows_of_experts(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let wide = if run.is_reference() { DType::F64 } else { DType::F32 };
    let leaves = [run.columns([rows, width], 1)?, run.tensor_of(&[rows, 2], 2, wide)?].map(Value::variable);
    let gathered: Vec<u32> = (0..2 * rows).map(|i| (i * i % rows) as u32).collect();
    let places: Vec<u32> = (0..2 * rows as u32).rev().collect();
    prepared(leaves.into(), move |v| {
        let y = gather_rows(&v[0], &gathered)?;
        let sums = combine_rows(&y, &v[1], &places)?;
        Ok(vec![y, sums])
    })
}

/// A matrix taken apart by columns and by rows, and put together in another order.
pub(super) fn parts(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = vec![Value::variable(run.columns([rows, width], 1)?)];
    prepared(leaves, move |v| {
        let mut columns = split_columns(&v[0], &[width / 3, width - width / 3])?;
        columns.reverse();
        let mut rows_apart = split_rows(&join_columns(&columns)?, &[1, rows - 1])?;
        rows_apart.reverse();
        Ok(vec![join_rows(&rows_apart)?])
    })
}

fn gate_of(activation: Activation, run: &Run, shape: [usize; 2]) -> Result<Prepared> {
    let leaves = [run.columns(shape, 1)?, run.columns(shape, 2)?].map(Value::variable);
    prepared(leaves.into(), move |v| Ok(vec![gated_activation(activation, &v[0], &v[1], SPARE)?]))
}

/// Numbers of a normal distribution.
pub(super) fn random_numbers(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (dtype, device) = (run.dtype, run.device.clone());
    prepared(vec![], move |_| {
        let made = normal_on_gpu(&(rows, width).into(), 7, 0.5, dtype, &device)?;
        let on_host = || {
            let numbers: Vec<f32> = (0..(rows * width) as u64).map(|i| 0.5 * random::normal(7, i)).collect();
            Tensor::from_vec(numbers, (rows, width), &device)?.to_dtype(dtype)
        };
        Ok(vec![Value::constant(made.map_or_else(on_host, Ok)?)])
    })
}

pub(super) fn look_up(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    // some ids come up often, some never
    let vocab = rows + 3;
    let ids: Vec<u32> = (0..2 * rows).map(|i| (i * i % vocab) as u32).collect();
    let arena = run.arena(&[("before", &[3]), ("table", &[vocab, width])])?;
    let (table, dtype, device) = (weight(&arena, "table")?, run.dtype, run.device.clone());
    let forward = move |_: &[Value]| Ok(vec![embedding(&ids, &table, dtype, &device)?]);
    Ok(Prepared { leaves: vec![], arena: Some(arena), forward: Box::new(forward) })
}

/// Frozen weights with a bias and with adapters.
pub(super) fn low_rank(run: &Run, size: Size) -> Result<Prepared> {
    adapted(run, size, 0.0)
}

/// The same with dropout in front of the adapters.
pub(super) fn low_rank_with_dropout(run: &Run, size: Size) -> Result<Prepared> {
    adapted(run, size, 0.1)
}

fn adapted(run: &Run, Size { rows, width }: Size, dropout: f32) -> Result<Prepared> {
    let rank = 16.min(width / 3);
    let arena =
        run.arena(&[("a0", &[rank, width]), ("a1", &[rank, width]), ("b0", &[width, rank]), ("b1", &[width, rank])])?;
    let member = |a: &str, b: &str, seed| -> Result<LinearMember> {
        let adapter = Adapter { a: weight(&arena, a)?, b: weight(&arena, b)?, scale: 1.5, dropout, place: seed };
        let weight = Weight::Frozen(run.tensor(&[width, width], seed)?);
        Ok(LinearMember { weight, bias: Some(Weight::Frozen(run.tensor(&[width], seed + 2)?)), adapter: Some(adapter) })
    };
    let group = LinearGroup::new(vec![member("a0", "b0", 9)?, member("a1", "b1", 10)?])?;
    let leaves = run.variables(&[&[rows, width]])?;
    Ok(Prepared { leaves, arena: Some(arena), forward: Box::new(move |v| group.forward(&v[0], Some(3))) })
}

pub(super) fn trained_linear(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let arena = run.arena(&[("w", &[width, width]), ("bias", &[width])])?;
    let (weight, bias) = (weight(&arena, "w")?, weight(&arena, "bias")?);
    let leaves = run.variables(&[&[rows, width]])?;
    let group = LinearGroup::new(vec![LinearMember { weight, bias: Some(bias), adapter: None }])?;
    Ok(Prepared { leaves, arena: Some(arena), forward: Box::new(move |v| group.forward(&v[0], None)) })
}

/// All rows times one factor, and each times its own.
pub(super) fn factors(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let leaves = vec![Value::variable(run.columns([rows, width], 1)?)];
    let factors: Vec<f32> = (0..rows).map(|row| 0.3 * row as f32 - 1.0).collect();
    prepared(leaves, move |v| Ok(vec![scaled(&v[0], 0.22)?, scaled_rows(&v[0], &factors)?]))
}

pub(super) fn write(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
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

pub(super) fn sums(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (x, y, columns) =
        (run.tensor(&[rows, width], 1)?, run.tensor(&[rows, width], 2)?, run.columns([rows, width], 4)?);
    let wide = if run.is_reference() { DType::F64 } else { DType::F32 };
    let sum = run.tensor_of(&[rows, width], 3, wide)?;
    prepared(vec![], move |_| {
        elementwise::add_assign(&y, &x)?;
        elementwise::add_assign(&sum, &x)?;
        elementwise::add_assign(&columns, &x)?;
        Ok([&y, &sum, &columns].map(|sum| Value::constant(sum.clone())).into())
    })
}

pub(super) fn conversions(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
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

pub(super) fn biases(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let (y, bias) = (run.columns([rows, width], 1)?, run.tensor(&[width], 2)?);
    let grad = run.tensor_of(&[width], 3, DType::F32)?;
    prepared(vec![], move |_| {
        elementwise::bias_grad(&y, &grad)?;
        elementwise::bias_add(&y, &bias)?;
        Ok(vec![Value::constant(y.clone()), Value::constant(grad.clone())])
    })
}

pub(super) fn dropout(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
    let x = run.tensor(&[rows, width], 1)?;
    prepared(vec![], move |_| Ok(vec![Value::constant(elementwise::dropout(&x, 1 << 40 | 77, 0.3)?)]))
}

/// A step on parameters that have a copy in the dtype, clipped. Values, moments, and how far the copies lie from the values' rounding.
pub(super) fn optimizer(run: &Run, Size { rows, width }: Size) -> Result<Prepared> {
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
pub(super) fn sample(run: &Run, Size { width: vocab, .. }: Size) -> Result<Prepared> {
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
