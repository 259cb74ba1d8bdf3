//! Frozen weights in the layout of the kernels: packed once, instead of the plain copy.

use half::bf16;
use rayon::prelude::*;

use crate::Element;
use crate::gemm::PANEL;
#[cfg(target_arch = "x86_64")]
use crate::level::Level;

/// A weight `[out, in]` of bf16 in panels of 16 outputs, `[out / 16][in / 2][16 outputs][2 inputs]`, zeros where the matrix ends.
///
/// A vector of 64 bytes holds two neighbouring inputs of 16 outputs: the operand of a dot product of pairs, and a row of a matrix unit's
/// tile. `y = x Wᵀ` reads panels as they lie; `dx = dy W` sums over outputs, for which blocks of them are turned over in the cache.
#[derive(Clone, PartialEq)]
pub struct PackedWeight {
    data: Vec<bf16>,
    outputs: usize,
    inputs: usize,
}

impl PackedWeight {
    /// Packs `weight [outputs, inputs]`, row-major.
    pub fn new(weight: &[bf16], outputs: usize, inputs: usize) -> Self {
        assert_eq!(weight.len(), outputs * inputs, "PackedWeight: {outputs} x {inputs}");
        let mut data = vec![bf16::ZERO; outputs.div_ceil(PANEL) * panel_len(inputs)];
        if inputs > 0 {
            data.par_chunks_exact_mut(panel_len(inputs)).enumerate().for_each(|(p, panel)| {
                pack_panel(&weight[p * PANEL * inputs..weight.len().min((p + 1) * PANEL * inputs)], inputs, panel);
            });
        }
        Self { data, outputs, inputs }
    }

    /// Rows of the weight.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the weight.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes in memory.
    pub fn size_in_bytes(&self) -> usize {
        size_of_val(&*self.data)
    }

    /// All panels, [`Self::panel_len`] apart.
    pub(crate) fn panels(&self) -> &[bf16] {
        &self.data
    }

    /// Elements of a panel.
    pub(crate) fn panel_len(&self) -> usize {
        panel_len(self.inputs)
    }

    /// Row `output` of the weight, widened or as it is, into `row [inputs]`.
    pub fn copy_row<T: Element>(&self, output: usize, row: &mut [T]) {
        assert!(output < self.outputs && row.len() == self.inputs, "copy_row: row {output} of {}", self.outputs);
        let panel = &self.data[output / PANEL * self.panel_len()..][..self.panel_len()];
        let pairs = panel.as_chunks::<2>().0.iter().skip(output % PANEL).step_by(PANEL);
        for (to, pair) in row.chunks_mut(2).zip(pairs) {
            for (to, x) in to.iter_mut().zip(pair) {
                *to = T::from_f32(x.to_f32());
            }
        }
    }

    /// `y[i] = weight[ids[i]]`, converted. `y` is `[ids, inputs]`.
    pub fn gather_rows<T: Element>(&self, ids: &[u32], y: &mut [T]) {
        assert_eq!(y.len(), ids.len() * self.inputs, "gather_rows: y");
        if self.inputs > 0 {
            let rows = y.par_chunks_exact_mut(self.inputs).with_min_len(16);
            rows.zip(ids).for_each(|(y, &id)| self.copy_row(id as usize, y));
        }
    }

    /// The weight as it was before, row-major.
    pub fn unpack(&self) -> Vec<bf16> {
        let mut weight = vec![bf16::ZERO; self.outputs * self.inputs];
        if self.inputs > 0 {
            let rows = weight.par_chunks_exact_mut(self.inputs).enumerate();
            rows.for_each(|(output, row)| self.copy_row(output, row));
        }
        weight
    }
}

impl std::fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "PackedWeight [{}, {}]", self.outputs, self.inputs)
    }
}

/// Packs up to sixteen rows into a panel of zeros.
fn pack_panel(rows: &[bf16], inputs: usize, panel: &mut [bf16]) {
    let done = pack_by_vectors(rows, inputs, panel);
    for (n, row) in rows.chunks_exact(inputs).enumerate() {
        for (k, pair) in row[done..].chunks(2).enumerate() {
            panel[((done / 2 + k) * PANEL + n) * 2..][..pair.len()].copy_from_slice(pair);
        }
    }
}

/// Packs the first inputs of a whole panel by vectors; how many that were.
#[cfg(target_arch = "x86_64")]
fn pack_by_vectors(rows: &[bf16], inputs: usize, panel: &mut [bf16]) -> usize {
    if !Level::current().has_avx512_bf16() || rows.len() < PANEL * inputs {
        return 0;
    }
    let done = inputs / 32 * 32;
    super::avx512_pack::pack_rows(rows, inputs, done, panel);
    done
}

#[cfg(not(target_arch = "x86_64"))]
fn pack_by_vectors(_: &[bf16], _: usize, _: &mut [bf16]) -> usize {
    0
}

fn panel_len(inputs: usize) -> usize {
    inputs.div_ceil(2) * 2 * PANEL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_weight_gives_back_what_went_in() {
        for (outputs, inputs) in [(1, 1), (16, 8), (33, 7), (50, 64), (0, 4), (3, 0)] {
            let weight: Vec<bf16> = (0..outputs * inputs).map(|i| <bf16 as Element>::from_f32(i as f32)).collect();
            let packed = PackedWeight::new(&weight, outputs, inputs);
            assert_eq!(packed.unpack(), weight);
            if inputs > 0 && outputs > 17 {
                let at = (packed.panel_len() + (inputs - 1) / 2 * 2 * PANEL) + 2;
                assert_eq!(packed.panels()[at + (inputs - 1) % 2], weight[18 * inputs - 1], "row 17, last input");
            }
        }
    }
}
