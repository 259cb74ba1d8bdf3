//! Where weights and adapters lie in the matrix of a group, and how adapters get there.

use std::{
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::{DType, Tensor};
use pmetal_metal::{Gpu, Grid, Part, PartTable, exact_zeros, kernels};

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
        if let Some(last) = ranks.iter_mut().rev().find(|ranks| ranks.start < ranks.end) {
            last.end = padded;
        }
        Ok(Some(Self { n, k: first.in_features(), r: padded, outputs, ranks }))
    }

    /// Of each adapter's `A` and `B`, which begin at `firsts` in a flat tensor: first value, rows, columns, and the row and column of the
    /// matrix.
    fn parts(&self, members: &[LinearMember], firsts: Vec<usize>) -> Vec<[usize; 5]> {
        let mut firsts = firsts.into_iter();
        let of_member = |((member, outputs), ranks): ((&LinearMember, &Range<usize>), &Range<usize>)| {
            let rank = member.rank();
            let a = [rank, self.k, self.n + ranks.start, 0];
            let b = [outputs.len(), rank, outputs.start, self.k + ranks.start];
            member.adapter.as_ref().map(|_| [a, b])
        };
        let places = members.iter().zip(&self.outputs).zip(&self.ranks).filter_map(of_member).flatten();
        places
            .zip(&mut firsts)
            .map(|([rows, columns, row, column], first)| [first, rows, columns, row, column])
            .collect()
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
pub(crate) struct Placement {
    values: Values,
    matrix: Tensor,
    /// First value, rows, columns, and the row and column of the matrix, of each part.
    parts: Vec<[usize; 5]>,
    /// The same, `[parts, 5]` u32, as the kernel `place_parts` reads it.
    table: Tensor,
}

#[derive(Debug)]
enum Values {
    /// Frozen, flat, f32; and whether they lie in the matrix.
    Frozen(Tensor, AtomicBool),
    /// Trained in this arena.
    Trained(Arena),
}

impl Placement {
    /// None where some adapters are trained and some not, or not all in one arena.
    pub(super) fn of(members: &[LinearMember], layout: &Layout, matrix: &Tensor) -> Result<Option<Arc<Self>>> {
        let weights = || {
            let adapters = members.iter().filter_map(|member| member.adapter.as_ref());
            adapters.flat_map(|adapter| [&adapter.a, &adapter.b])
        };
        let (values, firsts) = match weights().next().and_then(Weight::param) {
            Some(param) => {
                let arena = param.arena();
                let first = |weight: &Weight| weight.param().filter(|p| p.arena().is(arena)).map(|p| p.first());
                let Some(firsts) = weights().map(first).collect::<Option<Vec<_>>>() else { return Ok(None) };
                (Values::Trained(arena.clone()), firsts)
            }
            None if weights().any(|weight| weight.param().is_some()) => return Ok(None),
            None => {
                let flat = weights().map(|weight| {
                    let tensor = weight.tensor()?.to_device(matrix.device())?;
                    converted(&tensor.flatten_all()?, DType::F32)
                });
                let flat = flat.collect::<Result<Vec<_>>>()?;
                let firsts = flat.iter().scan(0, |sum, t| Some(std::mem::replace(sum, *sum + t.elem_count())));
                let firsts = firsts.collect();
                (Values::Frozen(Tensor::cat(&flat, 0)?, AtomicBool::new(false)), firsts)
            }
        };
        let parts = layout.parts(members, firsts);
        let numbers = parts.iter().flatten().map(|&n| u32::try_from(n)).collect::<Result<Vec<_>, _>>();
        let Ok(numbers) = numbers else { return Ok(None) };
        let table = upload(&numbers, matrix.device())?;
        let placement = Arc::new(Self { values, matrix: matrix.clone(), parts, table });
        if let Values::Trained(arena) = &placement.values {
            arena.placements().add(&placement);
        }
        Ok(Some(placement))
    }

    /// Brings the adapters' values into the matrix, where they have changed.
    pub(super) fn refresh(&self, gpu: &dyn Gpu) -> Result<()> {
        match &self.values {
            Values::Trained(arena) => arena.placements().refresh(gpu, arena),
            Values::Frozen(values, placed) if !placed.swap(true, Ordering::Relaxed) => self.place(gpu, values),
            Values::Frozen(..) => Ok(()),
        }
    }

    fn listed(&self) -> impl Iterator<Item = Part<'_>> {
        let matrix = &self.matrix;
        let part =
            |&[first, rows, columns, row, column]: &[usize; 5]| Part { first, rows, columns, matrix, row, column };
        self.parts.iter().map(part)
    }

    fn place(&self, gpu: &dyn Gpu, values: &Tensor) -> Result<()> {
        let largest = self.parts.iter().map(|[_, rows, columns, ..]| rows * columns).max().unwrap_or_default();
        let grid = Grid { groups: [largest.div_ceil(1024).clamp(1, 64), self.parts.len(), 1], threads: 256 };
        let params = kernels::PlaceParams { pitch: self.matrix.dim(1)? as u32 };
        Ok(kernels::place_parts(gpu, self.matrix.dtype(), grid, values, &self.table, &self.matrix, params)?)
    }
}

/// The matrices that hold copies of an arena's values: all are brought up to date at once, where the device has a kernel for that.
#[derive(Debug, Default)]
pub(crate) struct Placements {
    all: Vec<Weak<Placement>>,
    /// For all that are alive.
    table: Option<PartTable>,
    /// The version of the values that lie in the matrices.
    placed: Option<u64>,
}

impl Placements {
    fn add(&mut self, placement: &Arc<Placement>) {
        self.all.push(Arc::downgrade(placement));
        (self.table, self.placed) = (None, None);
    }

    fn refresh(&mut self, gpu: &dyn Gpu, arena: &Arena) -> Result<()> {
        let version = arena.version();
        if self.placed == Some(version) {
            return Ok(());
        }
        let before = self.all.len();
        self.all.retain(|placement| placement.strong_count() > 0);
        let alive: Vec<_> = self.all.iter().filter_map(Weak::upgrade).collect();
        if self.table.is_none() || alive.len() < before {
            let parts: Vec<_> = alive.iter().flat_map(|placement| placement.listed()).collect();
            self.table = gpu.part_table(&parts)?;
        }
        let values = arena.state().get(0)?;
        match &self.table {
            Some(table) => gpu.place(&values, table)?,
            None => alive.iter().try_for_each(|placement| placement.place(gpu, &values))?,
        }
        self.placed = Some(version);
        Ok(())
    }
}

impl LinearMember {
    /// The factor of its adapter.
    pub(super) fn scale(&self) -> f32 {
        self.adapter.as_ref().map_or(1.0, |Adapter { scale, .. }| *scale)
    }
}
