//! The products of one token, whose weights stream in from memory: `cargo bench -p pmetal-cpu --bench gemv`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{Group, TRAINING, Work, assert_product, numbers, settings, time, wide};
use pmetal_cpu::{FewRows, Mat, PackedWeight, Right, few_rows};

/// Weights that no cache holds: as many copies of a group as make up this many bytes are used in turn.
const BYTES: usize = 192 << 20;

fn tokens(criterion: &mut Criterion) {
    for shape in TRAINING {
        for group in shape.groups() {
            of_group(criterion, shape.name, &group);
        }
        of_group(criterion, shape.name, &Group { name: "head", inputs: shape.hidden, outputs: vec![shape.vocab] });
    }
}

fn of_group(criterion: &mut Criterion, name: &str, group: &Group) {
    let Group { inputs, outputs, .. } = group;
    let x = numbers::<bf16>(*inputs, 1);
    let plain: Vec<Vec<bf16>> = outputs.iter().map(|outputs| numbers(outputs * inputs, 2)).collect();
    let weights: Vec<PackedWeight> =
        plain.iter().zip(outputs).map(|(weight, outputs)| PackedWeight::new(weight, *outputs, *inputs)).collect();
    let bytes: usize = weights.iter().map(PackedWeight::size_in_bytes).sum();
    let copies = vec![weights; BYTES.div_ceil(bytes)];
    let mut results: Vec<Vec<bf16>> = outputs.iter().map(|&outputs| vec![bf16::ZERO; outputs]).collect();

    let run = |weights: &[PackedWeight], results: &mut [Vec<bf16>]| {
        let mut products: Vec<_> = results
            .iter_mut()
            .zip(weights)
            .map(|(c, weight)| FewRows { c_row_stride: c.len(), c, right: Right::Transposed(weight), low_rank: None })
            .collect();
        few_rows(Mat::new(&x, 1, *inputs), &mut products, 1.0, 0.0);
    };

    run(&copies[0], &mut results);
    let x64 = wide(&x);
    for ((y, weight), &outputs) in results.iter().zip(&plain).zip(outputs) {
        assert_product("y", y, outputs, *inputs, |_, j| {
            x64.iter().zip(wide(&weight[j * inputs..][..*inputs])).map(|(x, w)| x * w).sum()
        });
    }

    let mut turn = copies.iter().cycle();
    time(criterion, &format!("gemv: {}, {name}", group.name), Work::Bytes(bytes), || {
        if let Some(weights) = turn.next() {
            run(weights, &mut results);
        }
    });
}

criterion_group! {
    name = benches;
    config = settings();
    targets = tokens
}
criterion_main!(benches);
