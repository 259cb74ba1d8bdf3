//! What the benches share: shapes, the checks of the tests, and times as rates.
#![allow(dead_code, unused_imports)]

use std::time::{Duration, Instant};

use criterion::Criterion;

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
