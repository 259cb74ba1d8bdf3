//! The products of a training step, by groups of linear layers that share their input: `cargo bench -p pmetal-cpu --bench gemm`.

mod harness;

use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use harness::{Group, TRAINING, Work, assert_product, numbers, settings, time};
use pmetal_cpu::{Arithmetic, Element, Left, Mat, PackedWeight, Right, multiply};

const RANK: usize = 16;

fn products(criterion: &mut Criterion) {
    for shape in TRAINING {
        for group in shape.groups() {
            of_weights(criterion, shape.name, shape.tokens(), &group);
        }
        of_adapters(criterion, shape.name, shape.tokens(), shape.hidden, shape.mlp);
    }
}

/// The forward and the input's gradient, from one packed copy of each weight. Packing the activations is part of the time.
fn of_weights(criterion: &mut Criterion, name: &str, tokens: usize, group: &Group) {
    let Group { inputs, outputs, .. } = group;
    let arithmetic = Arithmetic::of::<bf16>();
    let x = numbers::<bf16>(tokens * inputs, 1);
    let plain: Vec<Vec<bf16>> = outputs.iter().map(|outputs| numbers(outputs * inputs, 2)).collect();
    let weights: Vec<PackedWeight> =
        plain.iter().zip(outputs).map(|(weight, outputs)| PackedWeight::new(weight, *outputs, *inputs)).collect();
    let mut results: Vec<Vec<bf16>> = outputs.iter().map(|outputs| numbers(tokens * outputs, 3)).collect();
    let dys = results.clone();
    let mut dx = x.clone();

    let forward = |results: &mut [Vec<bf16>]| {
        let left = Left::new(Mat::new(&x, tokens, *inputs), arithmetic);
        for ((y, weight), &outputs) in results.iter_mut().zip(&weights).zip(outputs) {
            multiply(y, outputs, &[(&left, Right::Transposed(weight))], 1.0, 0.0);
        }
    };
    let backward = |dx: &mut [bf16]| {
        let lefts: Vec<Left> = dys
            .iter()
            .zip(outputs)
            .map(|(dy, &outputs)| Left::new(Mat::new(dy, tokens, outputs), arithmetic))
            .collect();
        let terms: Vec<_> = lefts.iter().zip(&weights).map(|(left, weight)| (left, Right::Weight(weight))).collect();
        multiply(dx, *inputs, &terms, 1.0, 0.0);
    };

    forward(&mut results);
    for ((y, weight), &outputs) in results.iter().zip(&plain).zip(outputs) {
        let (x, weight) = (Rows(&x, *inputs), Rows(weight, *inputs));
        assert_product("y", y, outputs, *inputs, |i, j| dot(*inputs, |l| x.at(i, l) * weight.at(j, l)));
    }
    backward(&mut dx);
    let depth = outputs.iter().sum();
    assert_product("dx", &dx, *inputs, depth, |i, j| {
        let of_layers = dys.iter().zip(&plain).zip(outputs).map(|((dy, weight), &outputs)| {
            let (dy, weight) = (Rows(dy, outputs), Rows(weight, *inputs));
            dot(outputs, |l| dy.at(i, l) * weight.at(l, j))
        });
        of_layers.sum()
    });

    let flops = || Work::Flops(2 * tokens * inputs * depth);
    time(criterion, &format!("gemm: {} forward, {name}", group.name), flops(), || forward(&mut results));
    time(criterion, &format!("gemm: {} input gradient, {name}", group.name), flops(), || backward(&mut dx));
}

/// An adapter's half of the forward, `u = x Aᵀ`, and the gradients of both its matrices, whose sums run over the tokens.
fn of_adapters(criterion: &mut Criterion, name: &str, tokens: usize, inputs: usize, outputs: usize) {
    let arithmetic = Arithmetic::of::<bf16>();
    let (x, dy) = (numbers::<bf16>(tokens * inputs, 1), numbers::<bf16>(tokens * outputs, 2));
    let (a, du) = (numbers::<f32>(RANK * inputs, 3), numbers::<f32>(tokens * RANK, 4));
    let left = Left::new(Mat::new(&x, tokens, inputs), arithmetic);
    let [mut u, mut da, mut db] = [tokens, inputs, outputs].map(|n| vec![0.0f32; n * RANK]);
    let (xm, am, dym, dum) = (
        Mat::new(&x, tokens, inputs),
        Mat::new(&a, RANK, inputs),
        Mat::new(&dy, tokens, outputs),
        Mat::new(&du, tokens, RANK),
    );

    let half = |u: &mut [f32]| multiply(u, RANK, &[(&left, Right::plain(am.t()))], 1.0, 0.0);
    let gradient_of_a = |da: &mut [f32]| {
        multiply(da, inputs, &[(&Left::new(dum.t(), arithmetic), Right::plain(xm))], 1.0, 0.0);
    };
    let gradient_of_b = |db: &mut [f32]| {
        multiply(db, outputs, &[(&Left::new(dum.t(), arithmetic), Right::plain(dym))], 1.0, 0.0);
    };

    half(&mut u);
    let (x64, a64, dy64, du64) = (Rows(&x, inputs), Rows(&a, inputs), Rows(&dy, outputs), Rows(&du, RANK));
    assert_product("u", &u, RANK, inputs, |i, j| dot(inputs, |l| x64.at(i, l) * a64.at(j, l)));
    gradient_of_a(&mut da);
    assert_product("dA", &da, inputs, tokens, |i, j| dot(tokens, |l| du64.at(l, i) * x64.at(l, j)));
    gradient_of_b(&mut db);
    assert_product("dB", &db, outputs, tokens, |i, j| dot(tokens, |l| du64.at(l, i) * dy64.at(l, j)));

    let flops = |width: usize| Work::Flops(2 * tokens * width * RANK);
    let title = |what: &str| format!("gemm: rank {RANK}, {what}, {name}");
    time(criterion, &title("x Aᵀ"), flops(inputs), || half(&mut u));
    time(criterion, &title("gradient of A"), flops(inputs), || gradient_of_a(&mut da));
    time(criterion, &title("gradient of B"), flops(outputs), || gradient_of_b(&mut db));
}

/// A row-major matrix, read as f64.
struct Rows<'a, T>(&'a [T], usize);

impl<T: Element> Rows<'_, T> {
    fn at(&self, i: usize, j: usize) -> f64 {
        f64::from(self.0[i * self.1 + j].to_f32())
    }
}

fn dot(depth: usize, product: impl Fn(usize) -> f64) -> f64 {
    (0..depth).map(product).sum()
}

criterion_group! {
    name = benches;
    config = settings();
    targets = products
}
criterion_main!(benches);
