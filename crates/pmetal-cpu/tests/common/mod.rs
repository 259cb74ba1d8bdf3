//! What the tests share: numbers, conversions and comparisons.
#![allow(dead_code)]

use pmetal_cpu::{Element, uniform};

/// Numbers in (-1, 1), rounded to the dtype.
pub fn numbers<T: Element>(len: usize, seed: u64) -> Vec<T> {
    (0..len as u64).map(|i| T::from_f32(2.0 * uniform(seed, i) - 1.0)).collect()
}

/// The same numbers in f64.
pub fn wide<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// Relative size of the rounding to a dtype, or `f32_error` for f32.
pub fn rounding<T: Element>(f32_error: f64) -> f64 {
    let next = f64::from(T::from_f32(1.0 + 1.0 / 512.0).to_f32());
    match next {
        1.0 => 1.0 / 128.0,
        _ if f64::from(T::from_f32(1.0 + 1.0 / 8192.0).to_f32()) == 1.0 => 1.0 / 1024.0,
        _ => f32_error,
    }
}

/// Checks every element against `expected` within `tolerance`, relative to the larger of the number and `floor`.
#[track_caller]
pub fn assert_close<T: Element>(name: &str, actual: &[T], expected: &[f64], tolerance: f64, floor: f64) {
    assert_eq!(actual.len(), expected.len(), "{name}: length");
    for (i, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        let a = f64::from(a.to_f32());
        let bound = tolerance * e.abs().max(floor);
        assert!((a - e).abs() <= bound, "{name}[{i}]: {a} instead of {e}, off by {:e} > {bound:e}", (a - e).abs());
    }
}

/// Runs `f` on pools of one and of three threads; the results must be the same.
#[track_caller]
pub fn same_on_any_threads<R: PartialEq + Send>(f: impl Fn() -> R + Sync) {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(&f)
    };
    assert!(run(1) == run(3), "the result depends on the number of threads");
}
