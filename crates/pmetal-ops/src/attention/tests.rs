use super::*;
use crate::{
    autograd::gradients,
    rows::GradRows,
    testing::{assert_close, check_op, emulated, random},
};

const SPEC: AttentionSpec =
    AttentionSpec { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, reach: Reach::All, softcap: None };

#[test]
fn packed_rows_and_their_gradients() {
    let rows = Rows::packed(&[3, 1, 5]);
    let reference_rows = rows.clone();
    check_op(
        &[random(&[9, 24], 1), random(&[9, 12], 2), random(&[9, 12], 3)],
        move |t| Ok(vec![reference(&t[0], &t[1], &t[2], None, &reference_rows, &SPEC)?]),
        |v| Ok(vec![attention(&v[0], &v[1], &v[2], None, &rows, SPEC, 5)?]),
    );
}

/// A head's width of 8 goes to matrix units, of 6 to the plain kernels.
fn check_variant(head_dim: usize, reach: Reach, softcap: Option<f32>, has_sinks: bool) {
    let (spec, rows) = (AttentionSpec { head_dim, reach, softcap, ..SPEC }, Rows::packed(&[3, 1, 11]));
    let widths = [4, 2, 2].map(|heads| heads * head_dim);
    let mut inputs: Vec<Tensor> = (1..).zip(widths).map(|(seed, width)| random(&[15, width], seed)).collect();
    if has_sinks {
        inputs.push((random(&[4], 4) * 2.0).unwrap());
    }
    let reference_rows = rows.clone();
    check_op(
        &inputs,
        move |t| Ok(vec![reference(&t[0], &t[1], &t[2], t.get(3), &reference_rows, &spec)?]),
        |v| Ok(vec![attention(&v[0], &v[1], &v[2], v.get(3), &rows, spec, 3)?]),
    );
}

#[test]
fn windows_and_chunks_and_their_gradients() {
    for head_dim in [6, 8] {
        for reach in [Reach::Window(2), Reach::Window(4), Reach::Chunk(4), Reach::Chunk(7), Reach::Window(11)] {
            check_variant(head_dim, reach, None, false);
        }
    }
}

#[test]
fn caps_and_sinks_and_their_gradients() {
    for head_dim in [6, 8] {
        check_variant(head_dim, Reach::All, Some(0.8), false);
        check_variant(head_dim, Reach::All, None, true);
        check_variant(head_dim, Reach::Window(3), Some(2.0), true);
        check_variant(head_dim, Reach::Chunk(5), Some(0.5), true);
    }
}

#[test]
fn heads_wider_than_any_kernel_go_by_the_formula() {
    let (spec, rows) = (AttentionSpec { heads: 2, kv_heads: 1, head_dim: 600, ..SPEC }, Rows::packed(&[4]));
    let [q, k, v] =
        [(2, 1), (1, 2), (1, 3)].map(|(heads, seed)| random(&[4, heads * 600], seed).to_dtype(DType::F32).unwrap());
    let want = reference(&q, &k, &v, None, &rows, &spec).unwrap();
    let [q, k, v] = [q, k, v].map(Value::constant);
    for got in [attention(&q, &k, &v, None, &rows, spec, 0), emulated(|| attention(&q, &k, &v, None, &rows, spec, 0))] {
        assert_close(&want, got.unwrap().tensor(), 1e-6, "wide heads");
    }
}

#[test]
fn what_no_softmax_has_is_refused() {
    let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(h, s)| Value::constant(random(&[5, h * 6], s)));
    let rows = Rows::packed(&[5]);
    let sinks = Value::constant(random(&[3], 4));
    assert!(attention(&q, &k, &v, Some(&sinks), &rows, SPEC, 0).is_err());
    for reach in [Reach::Window(0), Reach::Chunk(0)] {
        assert!(attention(&q, &k, &v, None, &rows, AttentionSpec { reach, ..SPEC }, 0).is_err());
    }
    for cap in [0.0, -1.0, f32::NAN] {
        assert!(attention(&q, &k, &v, None, &rows, AttentionSpec { softcap: Some(cap), ..SPEC }, 0).is_err());
    }
}

#[test]
fn cached_rows_see_what_packed_ones_see() {
    let (capacity, kv_len) = (24, 23);
    let [k, v] = [2, 3].map(|seed| random(&[3 * capacity, 12], seed).to_dtype(DType::F32).unwrap());
    let q = random(&[6, 24], 1).to_dtype(DType::F32).unwrap();
    let sinks = random(&[4], 4).to_dtype(DType::F32).unwrap();
    let rows = Rows::cached(&[2, 1, 3], &[5, kv_len, 17], capacity);
    for reach in [Reach::Window(4), Reach::Chunk(5), Reach::Chunk(16), Reach::All] {
        let spec = AttentionSpec { reach, softcap: Some(3.0), ..SPEC };
        let want = reference(&q, &k, &v, Some(&sinks), &rows, &spec).unwrap();
        let [q, k, v, sinks] = [&q, &k, &v, &sinks].map(|t| Value::constant(t.clone()));
        let run = || attention(&q, &k, &v, Some(&sinks), &rows, spec, 0).unwrap();
        for got in [run(), emulated(run)] {
            assert_close(&want, got.tensor(), 1e-5, "cached");
        }
    }
}

#[test]
fn a_cached_row_continues_where_it_stopped() {
    let (capacity, kv_len) = (8, 7);
    let [k, v] = [2, 3].map(|seed| random(&[2 * capacity, 12], seed).to_dtype(DType::F32).unwrap());
    let q = random(&[3, 24], 1).to_dtype(DType::F32).unwrap();
    let rows = Rows::cached(&[2, 1], &[5, kv_len], capacity);
    let want = reference(&q, &k, &v, None, &rows, &SPEC).unwrap();
    let [q, k, v] = [q, k, v].map(Value::constant);
    let got = attention(&q, &k, &v, None, &rows, SPEC, 0).unwrap();
    assert_close(&want, got.tensor(), 1e-5, "cached");
}

/// Column ranges of one tensor in, free columns behind the result, gradients side by side: by the plain kernels (heads of 6) and on
/// matrix units (heads of 8), which want rows to begin at multiples of 8.
#[test]
fn ranges_of_wider_rows() {
    for (head_dim, spare) in [(6, 3), (8, 16), (8, 3)] {
        emulated(|| ranges(head_dim, spare));
    }
}

fn ranges(head_dim: usize, spare: usize) {
    let spec = AttentionSpec { head_dim, ..SPEC };
    let (rows, tokens) = (Rows::packed(&[3, 1, 5]), 9);
    let widths = [4, 2, 2].map(|heads| heads * head_dim);
    let starts = [0, widths[0], widths[0] + widths[1]];
    let total: usize = widths.iter().sum();
    let joint = random(&[tokens, total + spare], 1).to_dtype(DType::F32).unwrap();
    let grads = GradRows::new(tokens, total + spare);
    let leaves = [0, 1, 2].map(|i| {
        let range = joint.narrow(1, starts[i], widths[i]).unwrap();
        Value::variable(range).with_grad_place(grads.place(starts[i]))
    });
    let parent = grads.parent(DType::F32, &Device::Cpu).unwrap();
    parent.slice_set(&Tensor::full(7f32, parent.shape(), &Device::Cpu).unwrap(), 0, 0).unwrap();
    let dout = random(&[tokens, widths[0]], 2).to_dtype(DType::F32).unwrap();

    let y = attention(&leaves[0], &leaves[1], &leaves[2], None, &rows, spec, spare).unwrap();
    assert_eq!(y.spare().unwrap().dims(), [tokens, widths[0] + spare]);
    let got = gradients(vec![(y.clone(), dout.clone())], &leaves.each_ref()).unwrap();
    let reference_rows = rows.clone();
    let inputs = leaves.each_ref().map(|leaf| Value::variable(leaf.tensor().to_dtype(DType::F64).unwrap()));
    let of_reference =
        composite(&inputs.each_ref(), move |t| Ok(vec![reference(&t[0], &t[1], &t[2], None, &reference_rows, &spec)?]));
    let want_y = one(of_reference.unwrap());
    assert_close(want_y.tensor(), y.tensor(), 1e-5, "out");
    let dout = dout.to_dtype(DType::F64).unwrap();
    let want = gradients(vec![(want_y, dout)], &inputs.each_ref()).unwrap();
    for i in 0..3 {
        let (want, got) = (want[i].as_ref().unwrap(), got[i].as_ref().unwrap());
        assert_close(want, got, 1e-5, "gradient");
        if (total + spare).is_multiple_of(8) || head_dim == 6 {
            assert_close(want, &parent.narrow(1, starts[i], widths[i]).unwrap(), 1e-5, "gradient in its place");
        }
    }
    let rest = parent.narrow(1, total, spare).unwrap().flatten_all().unwrap();
    assert!(rest.to_vec1::<f32>().unwrap().iter().all(|&x| x == 7.0), "columns of others stay");
}

#[test]
fn rows_that_do_not_add_up_are_refused() {
    let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(h, s)| Value::constant(random(&[5, h * 6], s)));
    assert!(attention(&q, &k, &v, None, &Rows::packed(&[3, 3]), SPEC, 0).is_err());
    assert!(attention(&q, &k, &v, None, &Rows::packed(&[4]), SPEC, 0).is_err());
}
