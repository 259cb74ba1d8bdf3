//! Rope, gated activation, embedding, sums, biases, conversions and dropout against f64 loops.

mod common;

use common::{assert_close, numbers, rounding, same_on_any_threads, wide};
use half::{bf16, f16};
use pmetal_cpu::{
    Element, HeadLayout, add_assign, add_assign_mixed, bias_add, bias_grad, clamped_backward, clamped_forward, convert,
    dropout, gather_rows, geglu_backward, geglu_forward, rope, rope_into, scatter_add_rows, swiglu_backward,
    swiglu_forward, uniform,
};

fn check_rope<T: Element>(tokens: usize, heads: usize, half: usize, layout: HeadLayout) {
    let angles: Vec<f64> = (0..tokens * half).map(|i| f64::from(uniform(9, i as u64)) * 6.0).collect();
    let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
    let x = numbers::<T>(tokens * heads * layout.head_dim, 1);
    for inverse in [false, true] {
        let mut y = x.clone();
        rope(&mut y, heads, layout, &cos, &sin, inverse);
        let mut copy = vec![T::ZERO; x.len()];
        rope_into(&x, heads, layout, &cos, &sin, inverse, &mut copy);
        assert!(copy == y, "both agree");
        let mut expected = wide(&x);
        for (i, head) in expected.chunks_mut(layout.head_dim).enumerate() {
            for pair in 0..half {
                let angle = angles[i / heads * half + pair] * if inverse { -1.0 } else { 1.0 };
                let [low, high] = if layout.interleaved { [2 * pair, 2 * pair + 1] } else { [pair, pair + half] };
                let [low, high] = [low, high].map(|column| layout.start + column);
                let (a, b) = (head[low], head[high]);
                head[low] = a * angle.cos() - b * angle.sin();
                head[high] = a * angle.sin() + b * angle.cos();
            }
        }
        assert_close("rope", &y, &expected, rounding::<T>(1e-6), 0.5);
    }
}

#[test]
fn rope_turns_half_split_pairs_both_ways() {
    check_rope::<f32>(3, 2, 3, HeadLayout::whole(6));
    check_rope::<bf16>(2, 3, 32, HeadLayout::whole(64));
    check_rope::<bf16>(70, 3, 96, HeadLayout::whole(192));
    check_rope::<f16>(300, 4, 8, HeadLayout::whole(16));
}

#[test]
fn rope_turns_parts_and_neighbours_both_ways() {
    for (interleaved, (head_dim, start, half)) in
        [false, true].into_iter().flat_map(|i| [(9, 2, 3), (192, 128, 32), (17, 0, 8), (64, 0, 32)].map(|l| (i, l)))
    {
        let layout = HeadLayout { head_dim, start, interleaved };
        check_rope::<f32>(3, 2, half, layout);
        check_rope::<bf16>(70, 3, half, layout);
        check_rope::<f16>(1, 1, half, layout);
    }
}

/// From `dy`, `gate` and `up` to the gradients of the last two.
type Backward<T> = fn(&[T], &[T], &[T], &mut [T], &mut [T]);

/// A kernel of a gate, and that of its gradients, against the gate's function.
struct Gate<T> {
    forward: fn(&[T], &[T], &mut [T]),
    backward: Backward<T>,
    function: fn(f64) -> f64,
    /// Below this, a slope is what two larger terms leave of each other.
    floor: f64,
}

fn check_gate<T: Element>(n: usize, kernels: Gate<T>) {
    let spread = |x: Vec<T>| -> Vec<T> { x.iter().map(|x| T::from_f32(x.to_f32() * 12.0)).collect() };
    let (gate, up, dy) = (spread(numbers::<T>(n, 1)), numbers::<T>(n, 2), numbers::<T>(n, 3));
    let (mut y, mut dgate, mut dup) = (up.clone(), up.clone(), up.clone());
    (kernels.forward)(&gate, &up, &mut y);
    (kernels.backward)(&dy, &gate, &up, &mut dgate, &mut dup);
    let function = kernels.function;
    let (g, u, d) = (wide(&gate), wide(&up), wide(&dy));
    let h = 1e-6;
    let expected = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<f64>>();
    let tolerance = rounding::<T>(2e-6);
    assert_close("y", &y, &expected(&|i| function(g[i]) * u[i]), tolerance, 1e-2);
    assert_close("dup", &dup, &expected(&|i| function(g[i]) * d[i]), tolerance, 1e-2);
    let slope = |g: f64| (function(g + h) - function(g - h)) / (2.0 * h);
    assert_close("dgate", &dgate, &expected(&|i| slope(g[i]) * u[i] * d[i]), tolerance, kernels.floor);
}

fn check_gates<T: Element>(n: usize) {
    let silu = |g: f64| g / (1.0 + (-g).exp());
    check_gate::<T>(n, Gate { forward: swiglu_forward, backward: swiglu_backward, function: silu, floor: 1e-2 });
    let gelu = |g: f64| g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3))).tanh()) / 2.0;
    check_gate::<T>(n, Gate { forward: geglu_forward, backward: geglu_backward, function: gelu, floor: 0.1 });
}

#[test]
fn gated_activations_and_their_slopes() {
    for n in [1, 17, 1000, 40_000] {
        check_gates::<f32>(n);
        check_gates::<bf16>(n);
        check_gates::<f16>(n);
    }
}

fn check_clamped<T: Element>(n: usize) {
    const ALPHA: f32 = 1.702;
    const LIMIT: f32 = 0.75;
    let (gate, mut up, dy) = (numbers::<T>(n, 1), numbers::<T>(n, 2), numbers::<T>(n, 3));
    // at the limit itself the gradient still comes through
    up[0] = T::from_f32(-LIMIT);
    let (mut y, mut dgate, mut dup) = (up.clone(), up.clone(), up.clone());
    clamped_forward(ALPHA, LIMIT, &gate, &up, &mut y);
    clamped_backward(ALPHA, LIMIT, &dy, &gate, &up, &mut dgate, &mut dup);
    let (alpha, limit) = (f64::from(ALPHA), f64::from(LIMIT));
    let (g, u, d) = (wide(&gate), wide(&up), wide(&dy));
    let sigmoid = |g: f64| 1.0 / (1.0 + (-alpha * g).exp());
    let swish = |i: usize| g[i].min(limit) * sigmoid(g[i].min(limit));
    let factor = |i: usize| u[i].clamp(-limit, limit) + 1.0;
    let slope = |i: usize| {
        let s = sigmoid(g[i]);
        if g[i] > limit { 0.0 } else { s * (1.0 + alpha * g[i] * (1.0 - s)) }
    };
    let expected = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<f64>>();
    let tolerance = rounding::<T>(2e-6);
    assert_close("y", &y, &expected(&|i| swish(i) * factor(i)), tolerance, 1e-2);
    assert_close("dgate", &dgate, &expected(&|i| d[i] * factor(i) * slope(i)), tolerance, 0.1);
    let passed = |i: usize| if u[i].abs() > limit { 0.0 } else { d[i] * swish(i) };
    assert_close("dup", &dup, &expected(&passed), tolerance, 1e-2);
    assert!(n < 100 || (0..n).any(|i| g[i] > limit) && (0..n).any(|i| u[i] > limit) && (0..n).any(|i| u[i] < -limit));
}

#[test]
fn clamped_gates_and_their_slopes() {
    for n in [1, 17, 1000, 40_000] {
        check_clamped::<f32>(n);
        check_clamped::<bf16>(n);
        check_clamped::<f16>(n);
    }
}

#[test]
fn gathering_and_scattering_rows() {
    let (vocab, width) = (50, 37);
    let table = numbers::<bf16>(vocab * width, 1);
    let ids: Vec<u32> = (0..900).map(|i| (uniform(3, i) * uniform(4, i) * vocab as f32) as u32).collect();
    let mut y = vec![0.0f32; ids.len() * width];
    gather_rows(&table, &ids, width, &mut y);
    let dy = numbers::<f32>(y.len(), 2);
    let mut dtable = vec![0.25f32; vocab * width];
    scatter_add_rows(&dy, &ids, width, &mut dtable);
    let mut expected = vec![0.25f64; vocab * width];
    for (i, &id) in ids.iter().enumerate() {
        for e in 0..width {
            assert_eq!(y[i * width + e], table[id as usize * width + e].to_f32());
            expected[id as usize * width + e] += f64::from(dy[i * width + e]);
        }
    }
    assert_close("dtable", &dtable, &expected, 1e-5, 1.0);
    same_on_any_threads(|| {
        let mut dtable = vec![0.0f32; vocab * width];
        scatter_add_rows(&dy, &ids, width, &mut dtable);
        dtable
    });
}

#[test]
fn sums_and_conversions() {
    for n in [1, 100, 50_001] {
        let (a, b) = (numbers::<bf16>(n, 1), numbers::<bf16>(n, 2));
        let sums: Vec<f64> = wide(&a).iter().zip(wide(&b)).map(|(a, b)| a + b).collect();
        let mut y = a.clone();
        add_assign(&mut y, &b);
        assert_close("bf16 sum", &y, &sums, rounding::<bf16>(0.0), 0.0);
        let mut y = vec![0.0f32; n];
        convert(&a, &mut y);
        assert!(y.iter().zip(&a).all(|(y, a)| *y == a.to_f32()));
        add_assign_mixed(&mut y, &b);
        assert_close("mixed sum", &y, &sums, 1e-7, 0.0);
        let mut halves = vec![f16::ZERO; n];
        convert(&y, &mut halves);
        assert!(halves.iter().zip(&y).all(|(h, &y)| *h == f16::from_f32(y)));
    }
}

#[test]
fn bias_and_its_gradient() {
    let (rows, width) = (700, 45);
    let (x, bias) = (numbers::<bf16>(rows * width, 1), numbers::<f32>(width, 2));
    let mut y = x.clone();
    bias_add(&mut y, &bias, width);
    let expected: Vec<f64> = wide(&x).iter().enumerate().map(|(i, x)| x + f64::from(bias[i % width])).collect();
    assert_close("y", &y, &expected, rounding::<bf16>(0.0), 0.0);
    let mut dbias = vec![1.0f32; width];
    bias_grad(&x, width, &mut dbias);
    let column = |j: usize| 1.0 + wide(&x).iter().skip(j).step_by(width).sum::<f64>();
    assert_close("dbias", &dbias, &(0..width).map(column).collect::<Vec<_>>(), 1e-5, 1.0);
    same_on_any_threads(|| {
        let mut dbias = vec![0.0f32; width];
        bias_grad(&x, width, &mut dbias);
        dbias
    });
}

#[test]
fn dropout_keeps_the_rate_and_its_mask() {
    let n = 100_000;
    let (x, ones) = (numbers::<f32>(n, 1), vec![1.0f32; n]);
    let (mut y, mut mask) = (vec![0.0; n], vec![0.0; n]);
    dropout(&x, &mut y, 42, 0.25);
    dropout(&ones, &mut mask, 42, 0.25);
    assert!((0..n).all(|i| y[i] == x[i] * mask[i] && (mask[i] == 0.0 || mask[i] == 1.0 / 0.75)));
    assert!((0..n).all(|i| (mask[i] != 0.0) == (uniform(42, i as u64) >= 0.25)));
    let kept = mask.iter().filter(|&&m| m != 0.0).count() as f64 / n as f64;
    assert!((kept - 0.75).abs() < 0.01, "kept {kept}");
    let mut other = vec![0.0; n];
    dropout(&ones, &mut other, 43, 0.25);
    assert!(other != mask, "another seed, another mask");
    dropout(&x, &mut y, 42, 0.0);
    assert!(y == x);
}
