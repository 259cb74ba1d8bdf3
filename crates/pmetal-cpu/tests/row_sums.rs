//! Sums of listed rows, the gradients of their weights, and copies of columns against loops.

mod common;

use common::{assert_close, numbers, rounding, same_on_any_threads, wide};
use half::{bf16, f16};
use pmetal_cpu::{Columns, Element, RowLists, copy_columns, dot_rows, sum_rows};

/// Lists of 0 to 4 entries, and the weights' numbers in another order.
struct Lists {
    starts: Vec<u32>,
    rows: Vec<u32>,
    weights: Vec<u32>,
}

impl Lists {
    fn new(n: usize, source: usize) -> Self {
        let mut starts = vec![0];
        starts.extend((0..n as u32).scan(0, |end, r| {
            *end += r * 3 % 5;
            Some(*end)
        }));
        let entries = starts[n];
        let rows = (0..entries).map(|e| (e * e + 3 * e) % source as u32).collect();
        Self { starts, rows, weights: (0..entries).rev().collect() }
    }

    fn lists(&self) -> RowLists<'_> {
        RowLists { starts: &self.starts, rows: &self.rows, weights: &self.weights }
    }

    /// Row of the result, entry.
    fn entries(&self) -> impl Iterator<Item = (usize, usize)> {
        let ranges = self.starts.windows(2).enumerate();
        ranges.flat_map(|(r, range)| (range[0] as usize..range[1] as usize).map(move |e| (r, e)))
    }
}

fn check<T: Element>(n: usize, width: usize) {
    let source = n / 2 + 1;
    let lists = Lists::new(n, source);
    let x = numbers::<T>(source * width, 1);
    let weights = numbers::<f32>(lists.rows.len(), 2);
    for weights in [None, Some(&weights[..])] {
        let mut y = vec![T::from_f32(f32::NAN); n * width];
        sum_rows(&x, lists.lists(), weights, width, &mut y);
        let mut expected = vec![0.0f64; y.len()];
        for (r, e) in lists.entries() {
            let weight = weights.map_or(1.0, |weights| f64::from(weights[lists.weights[e] as usize]));
            for c in 0..width {
                expected[r * width + c] += weight * f64::from(x[lists.rows[e] as usize * width + c].to_f32());
            }
        }
        assert_close("sums", &y, &expected, rounding::<T>(1e-6), 0.5);
    }
    let dy = numbers::<T>(n * width, 3);
    let (d, wide_x) = (wide(&dy), wide(&x));
    let mut dots = vec![f32::NAN; lists.rows.len()];
    dot_rows(&dy, &x, lists.lists(), width, &mut dots);
    let mut expected = vec![f64::NAN; dots.len()];
    for (r, e) in lists.entries() {
        let row = lists.rows[e] as usize;
        expected[lists.weights[e] as usize] = (0..width).map(|c| d[r * width + c] * wide_x[row * width + c]).sum();
    }
    assert_close("products", &dots, &expected, 1e-5, (width as f64).sqrt());
}

#[test]
fn sums_and_products_of_listed_rows() {
    for (n, width) in [(1, 1), (7, 19), (40, 1000), (300, 130)] {
        check::<f32>(n, width);
        check::<bf16>(n, width);
        check::<f16>(n, width);
    }
    let (lists, x) = (Lists::new(400, 90), numbers::<f32>(90 * 257, 1));
    let weights = numbers::<f32>(lists.rows.len(), 2);
    same_on_any_threads(|| {
        let (mut y, mut dots) = (vec![0.0f32; 400 * 257], vec![0.0f32; weights.len()]);
        sum_rows(&x, lists.lists(), Some(&weights), 257, &mut y);
        dot_rows(&y, &x, lists.lists(), 257, &mut dots);
        y.extend(dots);
        y
    });
}

#[test]
fn columns_go_where_they_belong() {
    for (rows, width) in [(1, 1), (3, 17), (900, 40)] {
        let x = numbers::<bf16>(rows * (width + 5), 1);
        let mut y = vec![bf16::ZERO; rows * (width + 2)];
        let (from, to) = (Columns { pitch: width + 5, first: 4 }, Columns { pitch: width + 2, first: 1 });
        copy_columns(&x, from, &mut y, to, width);
        for (r, row) in y.chunks(width + 2).enumerate() {
            assert_eq!(row[1..=width], x[r * (width + 5) + 4..][..width]);
            assert!(row[0] == bf16::ZERO && row[width + 1] == bf16::ZERO);
        }
    }
}
