//! Products of few rows against plain f64 loops.

mod common;

use common::{assert_close, numbers, rounding, same_on_any_threads, wide};
use half::{bf16, f16};
use pmetal_cpu::{Element, FewRows, MAX_ROWS, Mat, PackedWeight, Right, few_rows};

/// `sum += a bᵀ` for `a [rows, depth]` and `b [columns, depth]`.
fn add_products(sum: &mut [f64], rows: usize, columns: usize, a: &[f64], b: &[f64]) {
    let depth = a.len() / rows;
    for i in 0..rows {
        for j in 0..columns {
            sum[i * columns + j] += (0..depth).map(|l| a[i * depth + l] * b[j * depth + l]).sum::<f64>();
        }
    }
}

/// Three products of one input: by packed weights and by a plain one, the first of them with a low-rank part.
fn check<A: Element, C: Element>(rows: usize, depth: usize, widths: [usize; 3], rank: usize) {
    let a = numbers::<A>(rows * depth, 1);
    let weights = [2, 3, 4].map(|seed| numbers::<bf16>(widths[seed as usize - 2] * depth, seed));
    let packed: Vec<PackedWeight> =
        weights.iter().zip(widths).map(|(weight, width)| PackedWeight::new(weight, width, depth)).collect();
    let (u, v) = (numbers::<f32>(rows * rank, 5), numbers::<f32>(widths[0] * rank, 6));
    for (alpha, beta) in [(1.0, 0.0), (0.5, -2.0)] {
        let start = widths.map(|width| {
            if beta == 0.0 { vec![C::from_f32(f32::NAN); rows * width] } else { numbers::<C>(rows * width, 7) }
        });
        let mut results = start.clone();
        let rights = [
            Right::Transposed(&packed[0]),
            Right::plain(Mat::new(&weights[1], widths[1], depth).t()),
            Right::Transposed(&packed[2]),
        ];
        let mut low_rank = Some((u.as_slice(), Right::plain(Mat::new(&v, widths[0], rank).t())));
        let products = results.iter_mut().zip(rights).zip(widths);
        let mut products: Vec<FewRows<C>> = products
            .map(|((c, right), width)| FewRows { c, c_row_stride: width, right, low_rank: low_rank.take() })
            .collect();
        few_rows(Mat::new(&a, rows, depth), &mut products, alpha, beta);
        for (p, (result, start)) in results.iter().zip(&start).enumerate() {
            let mut sums = vec![0.0; result.len()];
            add_products(&mut sums, rows, widths[p], &wide(&a), &wide(&weights[p]));
            if p == 0 {
                add_products(&mut sums, rows, widths[p], &wide(&u), &wide(&v));
            }
            let old = wide(start).into_iter().map(|c| if beta == 0.0 { 0.0 } else { f64::from(beta) * c });
            let expected: Vec<f64> = sums.iter().zip(old).map(|(sum, old)| f64::from(alpha) * sum + old).collect();
            assert_close("c", result, &expected, rounding::<C>(1e-6), ((depth + rank) as f64).sqrt() + 1.0);
        }
    }
}

#[test]
fn every_number_of_rows_and_odd_sizes() {
    for rows in 1..=MAX_ROWS {
        for (depth, widths, rank) in
            [(1, [1, 2, 3], 1), (7, [16, 5, 33], 3), (64, [31, 48, 17], 8), (131, [40, 1, 16], 16)]
        {
            check::<f32, f32>(rows, depth, widths, rank);
            check::<bf16, bf16>(rows, depth, widths, rank);
            check::<bf16, f32>(rows, depth, widths, rank);
            check::<f16, f16>(rows, depth, widths, rank);
        }
    }
}

#[test]
fn sizes_that_need_several_tasks() {
    for rows in [1, 3, 6] {
        check::<bf16, f32>(rows, 700, [530, 90, 70], 16);
        check::<f32, f32>(rows, 300, [400, 300, 290], 64);
    }
}

#[test]
fn rows_may_lie_apart_and_the_result_too() {
    let (rows, depth, width) = (3, 9, 20);
    let (a, weight) = (numbers::<bf16>(rows * (depth + 2), 1), numbers::<bf16>(width * depth, 2));
    let packed = PackedWeight::new(&weight, width, depth);
    let mut result = vec![5.0f32; rows * (width + 3)];
    let product =
        FewRows { c: &mut result, c_row_stride: width + 3, right: Right::Transposed(&packed), low_rank: None };
    few_rows(Mat::strided(&a, rows, depth, depth + 2), &mut [product], 1.0, 0.0);
    for (i, row) in result.chunks_exact(width + 3).enumerate() {
        let mut expected = vec![0.0; width];
        add_products(&mut expected, 1, width, &wide(&a[i * (depth + 2)..][..depth]), &wide(&weight));
        assert_close("c", &row[..width], &expected, 1e-6, 4.0);
        assert_eq!(row[width..], [5.0; 3], "wrote between the rows");
    }
}

#[test]
fn threads_do_not_matter() {
    let (depth, width) = (600, 900);
    let (a, weight) = (numbers::<bf16>(2 * depth, 1), numbers::<bf16>(width * depth, 2));
    let packed = PackedWeight::new(&weight, width, depth);
    same_on_any_threads(|| {
        let mut c = vec![0.0f32; 2 * width];
        let product = FewRows { c: &mut c, c_row_stride: width, right: Right::Transposed(&packed), low_rank: None };
        few_rows(Mat::new(&a, 2, depth), &mut [product], 1.0, 0.0);
        c
    });
}
