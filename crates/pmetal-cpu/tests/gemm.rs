//! Products against plain f64 loops.

mod common;

use common::{assert_close, numbers, rounding, same_on_any_threads, wide};
use half::{bf16, f16};
use pmetal_cpu::{Arithmetic, Element, Left, Mat, PackedWeight, Right, matmul, multiply};

/// `alpha * A B + beta * C` with `A[i][l] = a[i * a_strides.0 + l * a_strides.1]`, and so on.
#[allow(clippy::too_many_arguments)]
fn reference(
    c: &mut [f64],
    c_stride: usize,
    (m, n, k): (usize, usize, usize),
    a: &[f64],
    a_strides: (usize, usize),
    b: &[f64],
    b_strides: (usize, usize),
    (alpha, beta): (f64, f64),
) {
    for i in 0..m {
        for j in 0..n {
            let sum: f64 =
                (0..k).map(|l| a[i * a_strides.0 + l * a_strides.1] * b[l * b_strides.0 + j * b_strides.1]).sum();
            let c = &mut c[i * c_stride + j];
            *c = alpha * sum + if beta == 0.0 { 0.0 } else { beta * *c };
        }
    }
}

fn check<A: Element, B: Element, C: Element>(m: usize, n: usize, k: usize) {
    let (a_pad, b_pad, c_stride) = (k + 3, n + 5, n + 2);
    let a = numbers::<A>(m.max(k) * (m.max(k) + 3), 1);
    let b = numbers::<B>(n.max(k) * (n.max(k) + 5), 2);
    let start = numbers::<C>(m * c_stride, 3);
    for (a_t, b_t) in [(false, false), (false, true), (true, false), (true, true)] {
        for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (-1.0, 0.25)] {
            let left = if a_t { Mat::strided(&a, k, m, m + 3).t() } else { Mat::strided(&a, m, k, a_pad) };
            let right = if b_t { Mat::strided(&b, n, k, k + 5).t() } else { Mat::strided(&b, k, n, b_pad) };
            let mut c = start.clone();
            if beta == 0.0 {
                c.iter_mut().for_each(|c| *c = C::from_f32(f32::NAN));
            }
            let mut expected = wide(&c);
            let a_strides = if a_t { (1, m + 3) } else { (a_pad, 1) };
            let b_strides = if b_t { (1, k + 5) } else { (b_pad, 1) };
            matmul(&mut c, c_stride, left, right, alpha, beta);
            let factors = (f64::from(alpha), f64::from(beta));
            reference(&mut expected, c_stride, (m, n, k), &wide(&a), a_strides, &wide(&b), b_strides, factors);
            for i in 0..m {
                let row = i * c_stride..i * c_stride + n;
                let floor = (k as f64).sqrt() + 1.0;
                assert_close("c", &c[row.clone()], &expected[row], rounding::<C>(1e-6), floor);
            }
            if beta != 0.0 {
                let gap = |i: usize| i * c_stride + n..(i + 1) * c_stride;
                assert!((0..m).all(|i| c[gap(i)] == start[gap(i)]), "wrote between the rows");
            }
        }
    }
}

#[test]
fn every_layout_and_odd_sizes() {
    for (m, n, k) in [(1, 1, 1), (1, 70, 67), (2, 33, 40), (3, 5, 100), (4, 129, 65), (5, 31, 7), (13, 33, 300)] {
        check::<f32, f32, f32>(m, n, k);
        check::<f32, bf16, f32>(m, n, k);
        check::<bf16, bf16, bf16>(m, n, k);
        check::<f16, f16, f16>(m, n, k);
    }
}

#[test]
fn sizes_that_need_several_tasks_and_slices() {
    check::<f32, bf16, f32>(110, 530, 90);
    check::<bf16, bf16, bf16>(97, 64, 1100);
    check::<bf16, f32, f32>(16, 600, 1040);
    check::<f32, f32, bf16>(300, 16, 260);
}

#[test]
fn blocks_of_the_result_meet() {
    let (m, n, k) = (1540, 1030, 3);
    let (a, b) = (numbers::<bf16>(m * k, 1), numbers::<bf16>(n * k, 2));
    let mut c = vec![bf16::ZERO; m * n];
    matmul(&mut c, n, Mat::new(&a, m, k), Mat::new(&b, n, k).t(), 1.0, 0.0);
    let mut expected = vec![0.0; m * n];
    reference(&mut expected, n, (m, n, k), &wide(&a), (k, 1), &wide(&b), (1, k), (1.0, 0.0));
    assert_close("c", &c, &expected, rounding::<bf16>(0.0), 0.1);
}

#[test]
fn an_empty_sum_scales_the_result() {
    for m in [2, 20] {
        let mut c = vec![3.0f32; m * 7];
        let none: [f32; 0] = [];
        matmul(&mut c, 7, Mat::new(&none, m, 0), Mat::new(&none, 0, 7), 1.0, 0.5);
        assert!(c.iter().all(|&c| c == 1.5));
        matmul(&mut c, 7, Mat::new(&none, m, 0), Mat::new(&none, 7, 0).t(), 1.0, 0.0);
        assert!(c.iter().all(|&c| c == 0.0));
    }
}

#[test]
fn threads_do_not_matter() {
    let (m, n, k) = (130, 700, 1030);
    let (a, b) = (numbers::<f32>(m * k, 1), numbers::<bf16>(n * k, 2));
    same_on_any_threads(|| {
        let mut c = vec![0.0f32; m * n];
        matmul(&mut c, n, Mat::new(&a, m, k), Mat::new(&b, n, k).t(), 1.0, 0.0);
        c
    });
    same_on_any_threads(|| {
        let mut c = vec![bf16::ZERO; n];
        matmul(&mut c, n, Mat::new(&a, 1, k), Mat::new(&b, n, k).t(), 1.0, 0.0);
        c
    });
}

/// A packed weight forward and turned over, with a plain low-rank term in the same sum, for activations of `T`.
fn check_packed<T: Element>(rows: usize, out: usize, width: usize) {
    let (x, dy) = (numbers::<T>(rows * width, 1), numbers::<T>(rows * out, 2));
    let weight = numbers::<bf16>(out * width, 3);
    let (r, arithmetic) = (6, Arithmetic::of::<T>());
    // numbers that bf16 holds: rounding operands changes nothing
    let [u, a, b] = [(rows * r, 4), (r * width, 5), (out * r, 6)]
        .map(|(len, seed)| numbers::<bf16>(len, seed).iter().map(|x| x.to_f32()).collect::<Vec<f32>>());
    let packed = PackedWeight::new(&weight, out, width);
    let half = Left::new(Mat::new(&u, rows, r), arithmetic);

    let (mut y, mut want) = (vec![T::ZERO; rows * out], vec![0.0; rows * out]);
    let left = Left::new(Mat::new(&x, rows, width), arithmetic);
    let low_rank = (&half, Right::plain(Mat::new(&b, out, r).t()));
    multiply(&mut y, out, &[(&left, Right::Transposed(&packed)), low_rank], 0.5, 0.0);
    let sizes = (rows, out, width);
    reference(&mut want, out, sizes, &wide(&x), (width, 1), &wide(&weight), (1, width), (0.5, 0.0));
    reference(&mut want, out, (rows, out, r), &wide(&u), (r, 1), &wide(&b), (1, r), (0.5, 1.0));
    assert_close("y", &y, &want, rounding::<T>(1e-6), (width as f64).sqrt());

    let (mut dx, mut want) = (vec![T::ZERO; rows * width], vec![0.0; rows * width]);
    let left = Left::new(Mat::new(&dy, rows, out), arithmetic);
    let low_rank = (&half, Right::plain(Mat::new(&a, r, width)));
    multiply(&mut dx, width, &[(&left, Right::Weight(&packed)), low_rank], 1.0, 0.0);
    let sizes = (rows, width, out);
    reference(&mut want, width, sizes, &wide(&dy), (out, 1), &wide(&weight), (width, 1), (1.0, 0.0));
    reference(&mut want, width, (rows, width, r), &wide(&u), (r, 1), &wide(&a), (width, 1), (1.0, 1.0));
    assert_close("dx", &dx, &want, rounding::<T>(1e-6), (out as f64).sqrt());
}

#[test]
fn packed_weights_serve_both_directions() {
    for (rows, out, width) in [(1, 1, 1), (9, 16, 32), (13, 33, 7), (40, 70, 97), (25, 100, 640), (530, 48, 33)] {
        check_packed::<bf16>(rows, out, width);
        check_packed::<f32>(rows, out, width);
        check_packed::<f16>(rows, out, width);
    }
}

#[test]
fn sums_longer_than_a_slice_of_packed_weights() {
    check_packed::<bf16>(14, 1200, 1170);
    check_packed::<f32>(14, 1200, 1170);
}
