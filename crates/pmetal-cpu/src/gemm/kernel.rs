//! The numbers that kernels multiply, f32 or pairs of bf16, and the kernel of each level.

use half::bf16;
use pulp::{Simd, WithSimd};

use crate::Element;
use crate::gemm::PANEL;
use crate::gemm::driver::{PITCH, Slice};
use crate::gemm::pack::Part;
use crate::gemm::right::{Right, bf16_panels, f32_panels};
use crate::gemm::tile::{product_rows, tile, tile_of};
use crate::level::Level;
use crate::simd::arch;

/// What a product multiplies; sums are f32 in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Both operands are widened to f32.
    F32,
    /// Both operands are bf16, or rounded to it.
    Bf16,
}

impl Arithmetic {
    /// The arithmetic for operands of the dtype of activations `T`: bf16 where they are, and the machine multiplies it faster than f32.
    pub fn of<T: Element>() -> Self {
        let fast = matches!(Level::current(), Level::Avx512Bf16 | Level::Amx | Level::NeonBf16);
        let is_bf16 = std::any::TypeId::of::<T>() == std::any::TypeId::of::<bf16>();
        if fast && is_bf16 { Self::Bf16 } else { Self::F32 }
    }
}

/// An element that kernels multiply.
pub(crate) trait Unit: Element + bytemuck::Pod {
    /// Neighbouring depths that lie together in a panel.
    const TOGETHER: usize;

    /// Columns of a panel.
    fn panel() -> usize;

    /// The panels of the columns and depths of `part`, and how far apart they are.
    fn panels<'a>(right: &'a Right, part: Part, buffer: &'a mut [Self]) -> (&'a [Self], usize);

    /// Multiplies a slice.
    fn multiply(slice: &Slice<Self>, c: &mut [f32]);
}

impl Unit for bf16 {
    const TOGETHER: usize = 2;

    fn panel() -> usize {
        PANEL
    }

    fn panels<'a>(right: &'a Right, part: Part, buffer: &'a mut [Self]) -> (&'a [Self], usize) {
        if let Right::Transposed(weight) = *right {
            return (
                &weight.panels()[part.lane / PANEL * weight.panel_len() + part.depth * PANEL..],
                weight.panel_len(),
            );
        }
        let panel_len = part.depths * PANEL;
        let panels = &mut buffer[..part.lanes.div_ceil(PANEL) * panel_len];
        bf16_panels(right, part, panels);
        (panels, panel_len)
    }

    fn multiply(slice: &Slice<Self>, c: &mut [f32]) {
        match Level::current() {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Level::Amx => super::amx::multiply(slice, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => super::avx512_bf16::multiply(slice, c),
            #[cfg(target_arch = "aarch64")]
            Level::NeonBf16 => super::neon_bf16::multiply(slice, c),
            level => panic!("multiply: {level} has no products of bf16"),
        }
    }
}

impl Unit for f32 {
    const TOGETHER: usize = 1;

    fn panel() -> usize {
        tile().columns
    }

    fn panels<'a>(right: &'a Right, part: Part, buffer: &'a mut [Self]) -> (&'a [Self], usize) {
        let width = Self::panel();
        let panels = &mut buffer[..part.lanes.div_ceil(width) * part.depths * width];
        f32_panels(right, part, width, panels);
        (panels, part.depths * width)
    }

    fn multiply(slice: &Slice<Self>, c: &mut [f32]) {
        slice.check(c, Self::panel());
        arch().dispatch(Tiles { slice, c });
    }
}

/// A slice of f32 by the loops of the instruction set.
struct Tiles<'a> {
    slice: &'a Slice<'a, f32>,
    c: &'a mut [f32],
}

impl WithSimd for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match tile_of::<S>().rows {
            12 => self.run::<S, 12>(simd),
            _ => self.run::<S, 6>(simd),
        }
    }
}

impl Tiles<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let Slice { a, rows, b, panel_len, panels, depths, add } = *self.slice;
        let width = 2 * S::F32_LANES;
        for panel in 0..panels {
            let b = &b[panel * panel_len..][..depths * width];
            for row in (0..rows).step_by(R) {
                let sums = product_rows::<S, R, PITCH>(simd, &a[row * PITCH..], b);
                for (r, sums) in sums.iter().enumerate().take(rows - row) {
                    let c = &mut self.c[(row + r) * panels * width + panel * width..][..width];
                    let (c, _) = S::as_mut_simd_f32s(c);
                    for (c, &sum) in c.iter_mut().zip(sums) {
                        *c = if add { simd.add_f32s(*c, sum) } else { sum };
                    }
                }
            }
        }
    }
}
