//! Tiles of a product by the matrix unit of Intel's CPUs (AMX): sixteen rows by sixteen columns, 32 depths an instruction.
//!
//! Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter 18.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

use half::bf16;

use super::PANEL;
use super::driver::{PITCH, Slice};

/// Rows and columns of a tile of sums.
const SIDE: usize = 16;
/// Depths that one instruction sums.
const STEP: usize = 32;
/// Rows of sums held at a time: two tiles high, and two wide.
const ROWS: usize = 2 * SIDE;

/// Whether the CPU has tiles of bf16 and the system lets this process use them, for which it is asked.
pub(crate) fn is_present() -> bool {
    // SYS_arch_prctl with the request for a part of the registers' state, and the number of the tiles' data (Linux, arch/x86)
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    if __cpuid_count(0, 0).eax < 7 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
    // SAFETY: the call changes which registers this process may use, and nothing else.
    bf16 & tile == 1 && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
}

/// `c [rows][panels * 16] (+)= a b` for a slice of the sum.
pub(super) fn multiply(slice: &Slice<bf16>, c: &mut [f32]) {
    slice.check(c, PANEL);
    let spare = (slice.rows - 1) / ROWS * ROWS + ROWS;
    assert!(slice.a.len() >= (spare - 1) * PITCH + slice.depths, "gemm: whole tiles of rows");
    let whole = slice.depths / STEP * STEP;
    // SAFETY: the level says that the machine has the instructions; `check` saw that the slices hold what is read and written, and
    // whole tiles of rows can be read.
    unsafe {
        if whole > 0 {
            pass(slice, 0, STEP, whole / STEP, slice.add, c);
        }
        if whole < slice.depths {
            pass(slice, whole, slice.depths - whole, 1, slice.add || whole > 0, c);
        }
    }
}

/// The shapes of the tile registers, as the instruction that loads them reads it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row.
    columns: [u16; 16],
    rows: [u8; 16],
}

/// `steps` steps of `depths` depths each, from depth `from`.
///
/// # Safety
/// The machine has AMX; the slice holds the depths, whole tiles of rows can be read, and `c` holds the rows and panels.
unsafe fn pass(slice: &Slice<bf16>, from: usize, depths: usize, steps: usize, add: bool, c: &mut [f32]) {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], columns: [0; 16], rows: [0; 16] };
    // four tiles of sums, two of the left operand, two of the right one
    shapes.columns[..8].copy_from_slice(&[64, 64, 64, 64, 2 * depths as u16, 2 * depths as u16, 64, 64]);
    shapes.rows[..8].copy_from_slice(&[16, 16, 16, 16, 16, 16, depths as u8 / 2, depths as u8 / 2]);
    let stride = slice.panels * PANEL;
    // SAFETY: the shapes are valid ones of palette 1; every address lies inside the operands, by the caller's promise.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly));
        for panel in (0..slice.panels).step_by(2) {
            let panels = (slice.panels - panel).min(2);
            let b = slice.b.as_ptr().add(panel * slice.panel_len + from * PANEL);
            for row in (0..slice.rows).step_by(ROWS) {
                let a = slice.a.as_ptr().add(row * PITCH + from);
                let rows = (slice.rows - row).min(ROWS);
                let at = row * stride + panel * PANEL;
                if rows == ROWS && panels == 2 {
                    tiles(a, [b, b.add(slice.panel_len)], steps, c.as_mut_ptr().add(at), stride, add);
                    continue;
                }
                // at the border sums go through a buffer, and a missing panel is the other one again
                let mut sums = [0.0f32; ROWS * 2 * PANEL];
                let other = if panels == 2 { b.add(slice.panel_len) } else { b };
                tiles(a, [b, other], steps, sums.as_mut_ptr(), 2 * PANEL, false);
                for (c, sums) in c[at..].chunks_mut(stride).zip(sums.chunks_exact(2 * PANEL)).take(rows) {
                    for (c, sum) in c.iter_mut().zip(&sums[..panels * PANEL]) {
                        *c = if add { *c + sum } else { *sum };
                    }
                }
            }
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Two by two tiles of sums at `c`, rows `stride` apart.
///
/// # Safety
/// The tile registers have their shapes; 32 rows of `a`, [`PITCH`] apart, and both panels of `b` hold the depths; `c` has 32 rows of 32.
#[inline]
unsafe fn tiles(a: *const bf16, b: [*const bf16; 2], steps: usize, c: *mut f32, stride: usize, add: bool) {
    let (c_next, row) = (c.wrapping_add(SIDE * stride), stride * size_of::<f32>());
    // SAFETY: the caller's promise; the block touches tile registers alone, which the compiler never uses.
    unsafe {
        if add {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 64]",
                "tileloadd tmm2, [{d} + {row}]",
                "tileloadd tmm3, [{d} + {row} + 64]",
                c = in(reg) c, d = in(reg) c_next, row = in(reg) row,
                options(nostack, readonly)
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {pitch}]",
            "tileloadd tmm6, [{b} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{d} + {line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{e} + {pitch}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {e}, 64",
            "add {b}, 1024",
            "add {d}, 1024",
            "dec {steps}",
            "jnz 2b",
            a = inout(reg) a => _, e = inout(reg) a.wrapping_add(SIDE * PITCH) => _,
            b = inout(reg) b[0] => _, d = inout(reg) b[1] => _,
            pitch = in(reg) PITCH * size_of::<bf16>(), line = in(reg) 2 * PANEL * size_of::<bf16>(),
            steps = inout(reg) steps => _,
            options(nostack, readonly)
        );
        asm!(
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 64], tmm1",
            "tilestored [{d} + {row}], tmm2",
            "tilestored [{d} + {row} + 64], tmm3",
            c = in(reg) c, d = in(reg) c_next, row = in(reg) row,
            options(nostack)
        );
    }
}
