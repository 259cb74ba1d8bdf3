//! What the benches share: shapes, the checks of the tests, and times as rates.
#![allow(dead_code, unused_imports)]

use std::time::{Duration, Instant};

use criterion::Criterion;
use pmetal_cpu::{Element, PoolAllocator};

/// The command's: buffers that kernels make are used again, as they are in a run.
#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

#[path = "../../tests/common/mod.rs"]
mod common;
pub use common::{assert_close, numbers, rounding, wide};

/// The sizes of a model and of a training step of it.
pub struct Shape {
    pub name: &'static str,
    /// Rows of a batch, and tokens of a row.
    pub rows: usize,
    pub row_len: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub vocab: usize,
}

impl Shape {
    pub fn tokens(&self) -> usize {
        self.rows * self.row_len
    }
}

/// The steps that docs/performance.md is about.
pub const TRAINING: [Shape; 2] = [
    Shape {
        name: "qwen3-cpu",
        rows: 2,
        row_len: 512,
        hidden: 1024,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        mlp: 3072,
        vocab: 32_000,
    },
    Shape {
        name: "SmolLM2",
        rows: 4,
        row_len: 512,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        mlp: 1536,
        vocab: 49_152,
    },
];

/// Linear layers that share their input: its width, and those of the results.
pub struct Group {
    pub name: &'static str,
    pub inputs: usize,
    pub outputs: Vec<usize>,
}

impl Shape {
    /// The linear layers of a decoder layer.
    pub fn groups(&self) -> [Group; 4] {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let group = |name, inputs, outputs: &[usize]| Group { name, inputs, outputs: outputs.to_vec() };
        [
            group("q/k/v", self.hidden, &[queries, keys, keys]),
            group("o", queries, &[self.hidden]),
            group("gate/up", self.hidden, &[self.mlp, self.mlp]),
            group("down", self.mlp, &[self.hidden]),
        ]
    }
}

/// Checks some elements of the product `c [rows, columns]`, each against `element(i, j)` and its depth.
#[track_caller]
pub fn assert_product<T: Element>(
    name: &str,
    c: &[T],
    columns: usize,
    depth: usize,
    element: impl Fn(usize, usize) -> f64,
) {
    let rows = c.len() / columns;
    for i in [0, rows / 3, rows - 1] {
        for j in [0, 1, columns / 2, columns - 1] {
            let tolerance = rounding::<T>(1.0 / 128.0);
            assert_close(name, &c[i * columns + j..][..1], &[element(i, j)], tolerance, (depth as f64).sqrt() / 2.0);
        }
    }
}

/// What a call computes or moves.
pub enum Work {
    Flops(usize),
    Bytes(usize),
}

const SAMPLES: usize = 10;

/// Short: a figure within a few percent is what is asked for.
pub fn settings() -> Criterion {
    Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .nresamples(1000)
        .without_plots()
}

/// Times `call` and prints the median as a rate.
pub fn time(criterion: &mut Criterion, name: &str, work: Work, mut call: impl FnMut()) {
    let mut seconds = Vec::new();
    criterion.bench_function(name, |bencher| {
        bencher.iter_custom(|calls| {
            let started = Instant::now();
            (0..calls).for_each(|_| call());
            let elapsed = started.elapsed();
            seconds.push(elapsed.as_secs_f64() / calls as f64);
            elapsed
        });
    });
    // what came before was warming up; nothing at all where a filter left the bench out
    let mut measured = seconds.split_off(seconds.len().saturating_sub(SAMPLES));
    measured.sort_by(f64::total_cmp);
    if let Some(median) = measured.get(measured.len() / 2) {
        let (work, unit) = match work {
            Work::Flops(flops) => (flops, "GFLOP/s"),
            Work::Bytes(bytes) => (bytes, "GB/s"),
        };
        println!("{name}: {:.1} us, {:.1} {unit}", median * 1e6, work as f64 / median / 1e9);
    }
}
