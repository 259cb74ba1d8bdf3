//! Rows of the embedding's table: `cargo bench -p pmetal-cpu --bench embedding`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{TRAINING, Work, assert_close, numbers, settings, time, wide};
use pmetal_cpu::{PackedWeight, gather_rows, scatter_add_rows};

fn tables(criterion: &mut Criterion) {
    for shape in TRAINING {
        let (vocab, width) = (shape.vocab, shape.hidden);
        let table = numbers::<bf16>(vocab * width, 1);
        let packed = PackedWeight::new(&table, vocab, width);
        let ids: Vec<u32> = (0..shape.tokens()).map(|i| (i * 7919 % vocab) as u32).collect();
        let [mut y, mut from_packed] = [0; 2].map(|_| vec![bf16::ZERO; ids.len() * width]);
        let mut dtable = vec![0.0f32; vocab * width];

        gather_rows(&table, &ids, width, &mut y);
        packed.gather_rows(&ids, &mut from_packed);
        let rows: Vec<bf16> = ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).copied().collect();
        assert!(y == rows && from_packed == rows, "gather_rows");
        scatter_add_rows(&y, &ids, width, &mut dtable);
        let mut expected = vec![0.0; vocab * width];
        for (dy, &id) in wide(&y).chunks(width).zip(&ids) {
            expected[id as usize * width..].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        }
        assert_close("dtable", &dtable, &expected, 1e-6, 1.0);

        let bytes = Work::Bytes(2 * y.len() * size_of::<bf16>());
        let name = format!("embedding: gather, {}", shape.name);
        time(criterion, &name, bytes, || gather_rows(&table, &ids, width, &mut y));
        let bytes = Work::Bytes(2 * y.len() * size_of::<bf16>());
        let name = format!("embedding: gather from a packed table, {}", shape.name);
        time(criterion, &name, bytes, || packed.gather_rows(&ids, &mut y));
        let bytes = Work::Bytes(y.len() * (size_of::<bf16>() + 2 * size_of::<f32>()));
        let name = format!("embedding: gradient, {}", shape.name);
        time(criterion, &name, bytes, || scatter_add_rows(&y, &ids, width, &mut dtable));
    }
}

criterion_group! {
    name = benches;
    config = settings();
    targets = tables
}
criterion_main!(benches);
