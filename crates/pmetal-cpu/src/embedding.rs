//! Rows of a table by their numbers, and the gradient of that.

use rayon::prelude::*;

use crate::Element;
use crate::simd::{rows_per_task, simd_fn};

/// `y[i] = table[ids[i]]`, converted. `table` is `[vocab, width]`, `y` is `[ids, width]`.
pub fn gather_rows<W: Element, T: Element>(table: &[W], ids: &[u32], width: usize, y: &mut [T]) {
    assert!(width > 0, "gather_rows: width 0");
    assert_eq!(y.len(), ids.len() * width, "gather_rows: y");
    let rows = rows_per_task(width);
    let copy = |(y, ids): (&mut [T], &[u32])| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            let start = id as usize * width;
            assert!(start + width <= table.len(), "gather_rows: id {id} is outside the table");
            widen(&table[start..start + width], y);
        }
    };
    if ids.len() <= rows {
        return copy((y, ids));
    }
    y.par_chunks_mut(rows * width).zip(ids.par_chunks(rows)).for_each(copy);
}

simd_fn! {
    fn widen['a; W, T](row: &'a [W], y: &'a mut [T]) -> () {
        for (y, x) in y.iter_mut().zip(row) {
            *y = T::from_f32(x.to_f32());
        }
    }
}

/// `dtable[ids[i]] += dy[i]`. `dy` is `[ids, width]`, `dtable` is `[vocab, width]`.
///
/// Additions to one row are made by one thread in the order of `i`, so the number of threads does not matter.
pub fn scatter_add_rows<T: Element>(dy: &[T], ids: &[u32], width: usize, dtable: &mut [f32]) {
    assert!(width > 0, "scatter_add_rows: width 0");
    assert_eq!(dy.len(), ids.len() * width, "scatter_add_rows: dy");
    assert!(dtable.len().is_multiple_of(width), "scatter_add_rows: dtable");
    let vocab = dtable.len() / width;
    let mut order: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(&id, i)| (id, i)).collect();
    assert!(ids.iter().all(|&id| (id as usize) < vocab), "scatter_add_rows: an id is outside the table");
    // Sorted by row and then by place: each row's additions stay in order, and rows can go to different threads.
    order.par_sort_unstable();
    let mut rest = dtable;
    let mut first_row = 0;
    let mut groups = Vec::new();
    for group in order.chunk_by(|a, b| a.0 == b.0) {
        let row = group[0].0 as usize;
        let (_, tail) = rest.split_at_mut((row - first_row) * width);
        let (target, tail) = tail.split_at_mut(width);
        groups.push((target, group));
        (rest, first_row) = (tail, row + 1);
    }
    groups.into_par_iter().for_each(|(target, group)| {
        for &(_, i) in group {
            let start = i as usize * width;
            accumulate(&dy[start..start + width], target);
        }
    });
}

simd_fn! {
    fn accumulate['a; T](x: &'a [T], sum: &'a mut [f32]) -> () {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += x.to_f32();
        }
    }
}
