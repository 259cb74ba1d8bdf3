//! Right operands: panels as kernels read them, taken where they lie or packed into a buffer.

use half::bf16;

use crate::Element;
use crate::gemm::pack::{Part, pack_panels};
use crate::gemm::{Mat, Matrix, PANEL, PackedWeight};
#[cfg(target_arch = "x86_64")]
use crate::level::Level;
use crate::simd::simd_fn;

/// A right operand `[depth, columns]`.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// Packed for each task that reads it.
    Plain(Matrix<'a>),
    /// `Wᵀ [in, out]`, as in `y = x Wᵀ`.
    Transposed(&'a PackedWeight),
    /// `W [out, in]`, as in `dx = dy W`.
    Weight(&'a PackedWeight),
}

impl<'a> Right<'a> {
    /// A matrix that is not packed yet.
    pub fn plain<T: Element>(matrix: Mat<'a, T>) -> Self {
        Self::Plain(T::matrix(matrix))
    }

    pub(crate) fn depth(&self) -> usize {
        match self {
            Self::Plain(m) => m.shape().0,
            Self::Transposed(w) => w.inputs(),
            Self::Weight(w) => w.outputs(),
        }
    }

    pub(crate) fn columns(&self) -> usize {
        match self {
            Self::Plain(m) => m.shape().1,
            Self::Transposed(w) => w.outputs(),
            Self::Weight(w) => w.inputs(),
        }
    }
}

/// f32 panels `[depths][width]` of the columns of `part`.
pub(crate) fn f32_panels(right: &Right, part: Part, width: usize, panels: &mut [f32]) {
    let panel_len = part.depths * width;
    match *right {
        Right::Plain(Matrix::F32(m)) => pack_panels(m.right_operand(), part, width, panel_len, panels),
        Right::Plain(Matrix::Bf16(m)) => pack_panels(m.right_operand(), part, width, panel_len, panels),
        Right::Plain(Matrix::F16(m)) => pack_panels(m.right_operand(), part, width, panel_len, panels),
        Right::Transposed(weight) => widen(weight, part, width, panels),
        Right::Weight(weight) => widen_turned(weight, part, width, panels),
    }
}

/// Panels of outputs, `[in][width]`. A panel may hold several of the weight's, or a part of one.
fn widen(weight: &PackedWeight, part: Part, width: usize, panels: &mut [f32]) {
    let step = width.min(PANEL);
    for (i, panel) in panels.chunks_exact_mut(part.depths * width).enumerate() {
        let lane = part.lane + i * width;
        if lane >= part.lane + part.lanes {
            break;
        }
        for at in (0..width).step_by(step) {
            let from = lane + at;
            match weight.panels().get(from / PANEL * weight.panel_len()..) {
                Some(source) if !source.is_empty() => {
                    widen_lanes(&source[part.depth * PANEL..], from % PANEL, step, part.depths, at, width, panel);
                }
                _ => panel.chunks_exact_mut(width).for_each(|row| row[at..at + step].fill(0.0)),
            }
        }
    }
}

simd_fn! {
    /// `lanes` lanes from `lane` of a weight's panel, whose depths begin with a pair, to `at` of every row of `panel`.
    fn widen_lanes['a;](source: &'a [bf16], lane: usize, lanes: usize, depths: usize, at: usize, width: usize, panel: &'a mut [f32]) -> () {
        let pairs = source.as_chunks::<{ 2 * PANEL }>().0;
        for (rows, pairs) in panel[..depths * width].chunks_mut(2 * width).zip(pairs) {
            for (odd, row) in rows.chunks_exact_mut(width).enumerate() {
                for (y, pair) in row[at..at + lanes].iter_mut().zip(&pairs.as_chunks::<2>().0[lane..]) {
                    *y = pair[odd].to_f32();
                }
            }
        }
    }
}

simd_fn! {
    /// Panels of inputs, `[out][width]`.
    fn widen_turned['a;](weight: &'a PackedWeight, part: Part, width: usize, panels: &'a mut [f32]) -> () {
        for (i, panel) in panels.chunks_exact_mut(part.depths * width).enumerate() {
            let first = part.lane + i * width;
            let lanes = width.min((part.lane + part.lanes).saturating_sub(first));
            for (n, row) in panel.chunks_exact_mut(width).enumerate() {
                let output = part.depth + n;
                let source = &weight.panels()[output / PANEL * weight.panel_len()..][..weight.panel_len()];
                for (lane, y) in row.iter_mut().enumerate() {
                    let k = first + lane;
                    *y = if lane < lanes { source[(k / 2 * PANEL + output % PANEL) * 2 + k % 2].to_f32() } else { 0.0 };
                }
            }
        }
    }
}

/// bf16 panels `[depths / 2][16][2]` of the columns of `part`, whose `depth` is even; where `depths` goes beyond the operand there are zeros.
pub(crate) fn bf16_panels(right: &Right, part: Part, panels: &mut [bf16]) {
    match *right {
        Right::Plain(Matrix::F32(m)) => pack_pairs(m, part, panels),
        Right::Plain(Matrix::Bf16(m)) => pack_pairs(m, part, panels),
        Right::Plain(Matrix::F16(m)) => pack_pairs(m, part, panels),
        Right::Transposed(_) => unreachable!("a packed weight's panels are read where they lie"),
        Right::Weight(weight) => turn(weight, part, panels),
    }
}

fn pack_pairs<T: Element>(m: Mat<T>, part: Part, panels: &mut [bf16]) {
    let depths = part.depths.min(m.rows - part.depth);
    let panel_len = part.depths * PANEL;
    let done = panels_by_vectors(m, part, depths, panels);
    for (i, panel) in panels.chunks_exact_mut(panel_len).enumerate().skip(done) {
        let first = part.lane + i * PANEL;
        let lanes = PANEL.min((part.lane + part.lanes).saturating_sub(first));
        if lanes < PANEL || depths < part.depths {
            panel.fill(bf16::ZERO);
        }
        let data = &m.data[(part.depth * m.row_stride + first * m.col_stride).min(m.data.len())..];
        pack_panel(data, m.row_stride, m.col_stride, depths, lanes, panel);
    }
}

/// Packs the first panels by vectors, as far as they are whole; how many that were.
#[cfg(target_arch = "x86_64")]
fn panels_by_vectors<T: Element>(m: Mat<T>, part: Part, depths: usize, panels: &mut [bf16]) -> usize {
    use super::avx512_pack::{interleave, pack_rows};
    if !Level::current().has_avx512_bf16() || depths < part.depths {
        return 0;
    }
    let data = &m.data[part.depth * m.row_stride + part.lane * m.col_stride..];
    let panel_len = depths * PANEL;
    match T::matrix(Mat { data, ..m }) {
        Matrix::F32(m) if m.col_stride == 1 => pairs_of_panels(part, panels, panel_len, |lane, panels| {
            interleave(&m.data[lane..], m.row_stride, depths, panel_len, panels);
        }),
        Matrix::Bf16(m) if m.col_stride == 1 => pairs_of_panels(part, panels, panel_len, |lane, panels| {
            interleave(&m.data[lane..], m.row_stride, depths, panel_len, panels);
        }),
        Matrix::F32(m) if m.row_stride == 1 && depths.is_multiple_of(32) => {
            let whole = panels.chunks_exact_mut(panel_len).take(part.lanes / PANEL).enumerate();
            whole.map(|(i, panel)| pack_rows(&m.data[i * PANEL * m.col_stride..], m.col_stride, depths, panel)).count()
        }
        Matrix::Bf16(m) if m.row_stride == 1 && depths.is_multiple_of(32) => {
            let whole = panels.chunks_exact_mut(panel_len).take(part.lanes / PANEL).enumerate();
            whole.map(|(i, panel)| pack_rows(&m.data[i * PANEL * m.col_stride..], m.col_stride, depths, panel)).count()
        }
        _ => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn panels_by_vectors<T: Element>(_: Mat<T>, _: Part, _: usize, _: &mut [bf16]) -> usize {
    0
}

/// Calls `pack(first lane, two panels)` for every whole pair of panels; how many panels that were.
#[cfg(target_arch = "x86_64")]
fn pairs_of_panels(part: Part, panels: &mut [bf16], panel_len: usize, pack: impl Fn(usize, &mut [bf16])) -> usize {
    let pairs = panels.chunks_exact_mut(2 * panel_len).take(part.lanes / (2 * PANEL)).enumerate();
    2 * pairs.map(|(i, panels)| pack(i * 2 * PANEL, panels)).count()
}

simd_fn! {
    /// A panel whose element `(k, lane)` is `data[k * depth_stride + lane * lane_stride]`.
    fn pack_panel['a; T](data: &'a [T], depth_stride: usize, lane_stride: usize, depths: usize, lanes: usize, panel: &'a mut [bf16]) -> () {
        let rows = panel.as_chunks_mut::<{ 2 * PANEL }>().0;
        if lane_stride == 1 && lanes == PANEL {
            for (pair, row) in rows.iter_mut().enumerate().take(depths / 2) {
                let [even, odd] = [0, 1].map(|o| &data[(2 * pair + o) * depth_stride..][..PANEL]);
                for (lane, y) in row.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *y = [even[lane], odd[lane]].map(|x| <bf16 as Element>::from_f32(x.to_f32()));
                }
            }
            if depths % 2 == 1 {
                let last = &data[(depths - 1) * depth_stride..][..PANEL];
                for (y, x) in rows[depths / 2].as_chunks_mut::<2>().0.iter_mut().zip(last) {
                    y[0] = <bf16 as Element>::from_f32(x.to_f32());
                }
            }
            return;
        }
        for lane in 0..lanes {
            let column = &data[lane * lane_stride..];
            for k in 0..depths {
                rows[k / 2][2 * lane + k % 2] = <bf16 as Element>::from_f32(column[k * depth_stride].to_f32());
            }
        }
    }
}

/// Panels of inputs, with pairs of outputs.
fn turn(weight: &PackedWeight, part: Part, panels: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if Level::current().has_avx512_bf16() {
        return super::avx512_pack::turn(weight, part, panels);
    }
    turn_one_by_one(weight, part, panels);
}

fn turn_one_by_one(weight: &PackedWeight, part: Part, panels: &mut [bf16]) {
    let inputs = weight.inputs();
    for (i, panel) in panels.chunks_exact_mut(part.depths * PANEL).enumerate() {
        let first = part.lane + i * PANEL;
        for (n, row) in panel.as_chunks_mut::<{ 2 * PANEL }>().0.iter_mut().enumerate() {
            for (lane, pair) in row.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let k = first + lane;
                *pair = [0, 1].map(|o| {
                    let output = part.depth + 2 * n + o;
                    let at = output / PANEL * weight.panel_len() + (k / 2 * PANEL + output % PANEL) * 2 + k % 2;
                    if k < inputs { weight.panels().get(at).copied().unwrap_or_default() } else { bf16::ZERO }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_turned_by_vectors_are_those_turned_one_by_one() {
        for (outputs, inputs) in [(16, 32), (40, 50), (33, 7), (100, 97), (1, 64)] {
            let weight: Vec<bf16> = (1..=outputs * inputs).map(|i| <bf16 as Element>::from_f32(i as f32)).collect();
            let weight = PackedWeight::new(&weight, outputs, inputs);
            for (depth, lane) in [(0, 0), (outputs / 16 * 16, 0), (0, inputs / 32 * 32)] {
                let depths = (outputs - depth).next_multiple_of(2);
                let part = Part { lane, lanes: inputs - lane, depth, depths };
                if depths == 0 || part.lanes == 0 {
                    continue;
                }
                let [mut want, mut got] = [0, 1].map(|_| vec![bf16::ONE; part.lanes.div_ceil(PANEL) * depths * PANEL]);
                turn_one_by_one(&weight, part, &mut want);
                turn(&weight, part, &mut got);
                assert!(want == got, "{outputs} x {inputs} from {depth}, {lane}");
            }
        }
    }
}
