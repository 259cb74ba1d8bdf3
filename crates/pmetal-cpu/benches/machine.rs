//! What this machine can do at most, on all threads: `cargo bench -p pmetal-cpu --bench machine`. docs/performance.md holds the kernels
//! against these limits. PMETAL_CPU_LEVEL changes nothing here.

mod harness;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use harness::{Work, settings, time};
use pulp::{Arch, Simd, WithSimd};

/// Instructions of each accumulator in a call.
const STEPS: usize = 1 << 20;

fn products(criterion: &mut Criterion) {
    let threads = rayon::current_num_threads();
    let arch = Arch::new();
    let flops = rayon::broadcast(|_| arch.dispatch(FusedMultiplyAdds))[0];
    time(criterion, "machine: f32 multiply-add", Work::Flops(threads * flops), || {
        black_box(rayon::broadcast(|_| arch.dispatch(FusedMultiplyAdds)));
    });
    if let Some(dot_products) = bf16::dot_products() {
        let flops = dot_products();
        time(criterion, "machine: bf16 dot products", Work::Flops(threads * flops), || {
            black_box(rayon::broadcast(|_| dot_products()));
        });
    }
}

/// Sums that hide the latency of the instruction on every pipe, in registers.
struct FusedMultiplyAdds;

impl WithSimd for FusedMultiplyAdds {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        // AVX2 has sixteen registers, the others 32
        if S::F32_LANES == 8 { multiply_adds::<S, 12>(simd) } else { multiply_adds::<S, 24>(simd) }
    }
}

#[inline(always)]
fn multiply_adds<S: Simd, const N: usize>(simd: S) -> usize {
    let (x, y) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(0.25)));
    let mut sums = [simd.splat_f32s(1.0); N];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = simd.mul_add_f32s(x, y, *sum);
        }
    }
    black_box(sums);
    STEPS * N * S::F32_LANES * 2
}

#[cfg(target_arch = "x86_64")]
mod bf16 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// A function that runs dot products and says how many operations they were.
    pub fn dot_products() -> Option<fn() -> usize> {
        let present = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f");
        // SAFETY: the machine has the instructions.
        present.then_some(|| unsafe { run() })
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run() -> usize {
        let ones = black_box(_mm512_set1_ps(1.0));
        let (x, y) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
        let mut sums = [_mm512_setzero_ps(); 24];
        for _ in 0..super::STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, y);
            }
        }
        black_box(sums);
        super::STEPS * sums.len() * 32 * 2
    }
}

#[cfg(target_arch = "aarch64")]
mod bf16 {
    use std::arch::{aarch64::*, asm};
    use std::hint::black_box;

    /// A function that runs dot products and says how many operations they were.
    pub fn dot_products() -> Option<fn() -> usize> {
        // SAFETY: the machine has the instructions.
        std::arch::is_aarch64_feature_detected!("bf16").then_some(|| unsafe { run() })
    }

    #[target_feature(enable = "neon,bf16")]
    fn run() -> usize {
        let x = black_box(vdupq_n_u16(0x3f80));
        let mut sums = [vdupq_n_f32(0.0); 24];
        for _ in 0..super::STEPS {
            for sum in &mut sums {
                // SAFETY: the instruction reads and writes these registers alone.
                unsafe {
                    asm!("bfdot {0:v}.4s, {1:v}.8h, {1:v}.8h", inout(vreg) *sum, in(vreg) x, options(pure, nomem, nostack));
                }
            }
        }
        black_box(sums);
        super::STEPS * sums.len() * 8 * 2
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod bf16 {
    /// None that are known here.
    pub fn dot_products() -> Option<fn() -> usize> {
        None
    }
}

/// Bytes that each thread works on: what a core's own cache holds, what the shared cache holds, and far more than that.
const SIZES: [(&str, usize); 3] = [("second-level cache", 256 << 10), ("shared cache", 4 << 20), ("memory", 256 << 20)];

fn memory(criterion: &mut Criterion) {
    let threads = rayon::current_num_threads();
    for (place, size) in SIZES {
        let len = size / size_of::<f32>();
        let source = vec![1.0f32; threads * len];
        let arch = Arch::new();
        // small ones several times, or threads would cost more than the reading
        let times = ((16 << 20) / size).max(1);
        time(criterion, &format!("machine: reading, {place}"), Work::Bytes(threads * size * times), || {
            rayon::broadcast(|thread| {
                let x = &source[thread.index() * len..][..len];
                (0..times).for_each(|_| arch.dispatch(Sum { x: black_box(x) }));
            });
        });

        let mut target = source.clone();
        // half as much each way
        let parts: Vec<_> = source.chunks(len / 2).zip(target.chunks_mut(len / 2).map(std::sync::Mutex::new)).collect();
        time(criterion, &format!("machine: copying, {place}"), Work::Bytes(threads * size * times), || {
            rayon::broadcast(|thread| {
                let (source, target) = &parts[thread.index()];
                let mut target = target.lock().expect("no thread panics");
                (0..times).for_each(|_| black_box(&mut **target).copy_from_slice(black_box(source)));
            });
        });
    }
}

/// Reads everything.
struct Sum<'a> {
    x: &'a [f32],
}

impl WithSimd for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, _) = S::as_simd_f32s(self.x);
        let mut sums = [simd.splat_f32s(0.0); 8];
        for chunk in vectors.as_chunks::<8>().0 {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum = simd.add_f32s(*sum, x);
            }
        }
        black_box(sums);
    }
}

criterion_group! {
    name = benches;
    config = settings();
    targets = products, memory
}
criterion_main!(benches);
