//! Products against plain sums in f64.

use candle_core::{DType, Device, Tensor};
use pmetal_emulator::Emulator;
use pmetal_metal::{Gemm, Gpu};

fn matrix(rows: usize, cols: usize, dtype: DType) -> Tensor {
    let values = (0..rows * cols).map(|i| ((i * 37 % 23) as f32 - 11.0) / 8.0);
    Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((rows, cols)).unwrap().to_dtype(dtype).unwrap()
}

/// `rows` rows from the second on, `columns` columns from the third on.
fn part(t: &Tensor, rows: usize, columns: usize) -> Tensor {
    let first = t.dims()[0] - rows;
    t.narrow(0, first.min(1), rows).unwrap().narrow(1, 2, columns).unwrap()
}

fn rows_of(t: &Tensor) -> Vec<Vec<f64>> {
    t.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

#[test]
fn products_of_any_transposition_and_dtype() {
    let (m, k, n, alpha, beta) = (5, 33, 7, 0.5, 2.0);
    for (dtype, into) in [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
    ] {
        for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false), (true, true)] {
            let a = if a_transposed { matrix(k, m, dtype) } else { part(&matrix(m, k + 3, dtype), m, k) };
            let b = if b_transposed { part(&matrix(n, k + 5, dtype), n, k) } else { matrix(k, n, dtype) };
            // the result is a part of a larger storage, as ranges of an arena and columns of a wider tensor are
            let around = matrix(m + 2, n + 3, into);
            let c = part(&around, m, n);
            let (before, all_before) = (rows_of(&c), rows_of(&around));
            let product = Gemm { a: &a, a_transposed, b: &b, b_transposed, c: &c, alpha, beta };
            Emulator::new().gemm(&product).unwrap();
            let (a, b, c) = (rows_of(&a), rows_of(&b), rows_of(&c));
            let rounding = [(DType::F32, 1e-6), (DType::BF16, 4e-3), (DType::F16, 5e-4)];
            let tolerance = rounding.iter().find(|(dtype, _)| *dtype == into).unwrap().1;
            for i in 0..m {
                for j in 0..n {
                    let term = |l: usize| {
                        (if a_transposed { a[l][i] } else { a[i][l] }) * (if b_transposed { b[j][l] } else { b[l][j] })
                    };
                    let expected = f64::from(alpha) * (0..k).map(term).sum::<f64>() + f64::from(beta) * before[i][j];
                    assert!(
                        (c[i][j] - expected).abs() <= tolerance * expected.abs().max(1.0),
                        "{} for {expected}",
                        c[i][j]
                    );
                }
            }
            let changed = rows_of(&around).concat().iter().zip(all_before.concat()).filter(|(x, y)| *x != y).count();
            assert!(changed <= m * n, "{changed} elements changed");
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    let (a, b) = (matrix(2, 3, DType::F32), matrix(4, 2, DType::F32));
    let c = matrix(2, 2, DType::F32);
    let product = Gemm { a: &a, a_transposed: false, b: &b, b_transposed: false, c: &c, alpha: 1.0, beta: 0.0 };
    assert!(Emulator::new().gemm(&product).unwrap_err().to_string().contains("kernel gemm: b is"));
    let half = matrix(3, 2, DType::BF16);
    assert!(Emulator::new().gemm(&Gemm { b: &half, ..product }).is_err());
}
