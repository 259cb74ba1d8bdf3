//! Where weights and adapters lie in the matrix of a group, and how adapters get there.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, exact_zeros, kernels};

use crate::{
    Arena, Result, Weight,
    elementwise::converted,
    linear::{Adapter, LinearMember},
    place::{gpu_of, upload},
};

/// Ranks are padded to this, so that rows stay aligned for the widest loads.
const RANK_UNIT: usize = 16;

/// Sizes of the matrix, and each member's part of it.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Results of all members.
    pub(super) n: usize,
    /// Width of the input.
    pub(super) k: usize,
    /// Ranks of all adapters, padded.
    pub(super) r: usize,
    /// Each member's results.
    pub(super) outputs: Vec<Range<usize>>,
    /// Each member's ranks, the padding with the last; empty where it has no adapter.
    pub(super) ranks: Vec<Range<usize>>,
}

impl Layout {
    /// None where a weight or a bias is trained, is on no GPU, or has another dtype than the others.
    pub(super) fn of(members: &[LinearMember]) -> Result<Option<Self>> {
        let [first, ..] = members else { return Ok(None) };
        let Weight::Frozen(weight) = &first.weight else { return Ok(None) };
        let frozen = |member: &LinearMember| {
            let bias = member.bias.as_ref().is_none_or(|bias| bias.param().is_none());
            bias && matches!(&member.weight, Weight::Frozen(w) if w.dtype() == weight.dtype())
        };
        let known = matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16);
        if !known || gpu_of(weight.device())?.is_none() || !members.iter().all(frozen) {
            return Ok(None);
        }
        let (mut outputs, mut ranks) = (Vec::new(), Vec::new());
        let (mut n, mut r) = (0, 0);
        for member in members {
            outputs.push(n..n + member.out_features());
            ranks.push(r..r + member.rank());
            (n, r) = (n + member.out_features(), r + member.rank());
        }
        let padded = r.next_multiple_of(RANK_UNIT);
        if let Some(last) = ranks.iter_mut().rev().find(|ranks| ranks.len() > 0) {
            last.end = padded;
        }
        Ok(Some(Self { n, k: first.in_features(), r: padded, outputs, ranks }))
    }

    /// Of the members' weights.
    pub(super) fn dtype(&self, members: &[LinearMember]) -> DType {
        members.first().map_or(DType::F32, |member| member.weight.dtype())
    }

    /// The matrix with the weights in it; the one weight itself where there is nothing to add to it.
    pub(super) fn matrix(&self, members: &[LinearMember]) -> Result<Tensor> {
        let weights = members.iter().map(|member| member.weight.tensor()).collect::<Result<Vec<_>>>()?;
        if let ([weight], 0) = (&weights[..], self.r) {
            return Ok(weight.clone());
        }
        let device = weights[0].device();
        let matrix = exact_zeros((self.n + self.r, self.k + self.r), weights[0].dtype(), device)?;
        for (weight, outputs) in weights.iter().zip(&self.outputs) {
            matrix.narrow(0, outputs.start, outputs.len())?.slice_set(weight, 1, 0)?;
        }
        Ok(matrix)
    }
}

/// How the adapters' values come into the matrix.
#[derive(Debug)]
pub(super) struct Placement {
    values: Values,
    /// `[parts, 5]` u32, as the kernel `place_parts` reads it.
    parts: Tensor,
    count: usize,
    /// Values of the largest part.
    largest: usize,
    /// The version of the values that lie in the matrix.
    placed: Mutex<Option<u64>>,
}

#[derive(Debug)]
enum Values {
    /// Frozen, flat, f32.
    Frozen(Tensor),
    /// Trained in this arena.
    Trained(Arena),
}

impl Placement {
    /// None where some adapters are trained and some not, or not all in one arena.
    pub(super) fn of(members: &[LinearMember], layout: &Layout) -> Result<Option<Self>> {
        let adapters = || members.iter().filter_map(|member| member.adapter.as_ref());
        let weights = || adapters().flat_map(|adapter| [&adapter.a, &adapter.b]);
        let Some(device) = members.first().map(|member| member.weight.tensor()).transpose()? else { return Ok(None) };
        let device = device.device();
        let (values, firsts) = match weights().next().and_then(Weight::param) {
            Some(param) => {
                let arena = param.arena();
                let first = |weight: &Weight| weight.param().filter(|p| p.arena().is(arena)).map(|p| p.first());
                let Some(firsts) = weights().map(first).collect::<Option<Vec<_>>>() else { return Ok(None) };
                (Values::Trained(arena.clone()), firsts)
            }
            None => {
                if weights().any(|weight| weight.param().is_some()) {
                    return Ok(None);
                }
                let flat = weights().map(|weight| {
                    let tensor = weight.tensor()?.to_device(device)?;
                    Ok(converted(&tensor.flatten_all()?, DType::F32)?)
                });
                let flat = flat.collect::<Result<Vec<_>>>()?;
                let firsts = flat.iter().scan(0, |sum, t| Some(std::mem::replace(sum, *sum + t.elem_count())));
                let firsts = firsts.collect();
                (Values::Frozen(Tensor::cat(&flat, 0)?), firsts)
            }
        };
        let mut parts = Vec::new();
        let (mut firsts, mut largest) = (firsts.into_iter(), 0);
        for ((member, outputs), ranks) in members.iter().zip(&layout.outputs).zip(&layout.ranks) {
            let Some(adapter) = &member.adapter else { continue };
            let (out, rank) = (outputs.len(), adapter.rank());
            for (rows, columns, row, column) in
                [(rank, layout.k, layout.n + ranks.start, 0), (out, rank, outputs.start, layout.k + ranks.start)]
            {
                let first = firsts.next().unwrap_or_default();
                parts.extend([first, rows, columns, row, column]);
                largest = largest.max(rows * columns);
            }
        }
        let Ok(parts) = parts.iter().map(|&n| u32::try_from(n)).collect::<Result<Vec<_>, _>>() else { return Ok(None) };
        let count = parts.len() / 5;
        Ok(Some(Self { values, parts: upload(&parts, device)?, count, largest, placed: Mutex::default() }))
    }

    /// Brings the adapters' values into the matrix, where they have changed.
    pub(super) fn refresh(&self, gpu: &dyn Gpu, matrix: &Tensor) -> Result<()> {
        let (values, version) = match &self.values {
            Values::Frozen(values) => (values.clone(), 0),
            Values::Trained(arena) => (arena.state().get(0)?, arena.version()),
        };
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        if placed.replace(version) == Some(version) {
            return Ok(());
        }
        let grid = Grid { groups: [self.largest.div_ceil(1024).clamp(1, 64), self.count, 1], threads: 256 };
        let params = kernels::PlaceParams { pitch: matrix.dim(1)? as u32 };
        Ok(kernels::place_parts(gpu, matrix.dtype(), grid, &values, &self.parts, matrix, params)?)
    }
}

impl LinearMember {
    /// The factor of its adapter.
    pub(super) fn scale(&self) -> f32 {
        self.adapter.as_ref().map_or(1.0, |Adapter { scale, .. }| *scale)
    }
}
