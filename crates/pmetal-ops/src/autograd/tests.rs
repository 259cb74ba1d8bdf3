use candle_core::{DType, Tensor};

use super::*;
use crate::{
    Activation, gated_activation,
    testing::{assert_close, random},
};

fn f32_of(shape: &[usize], seed: u64) -> Tensor {
    random(shape, seed).to_dtype(DType::F32).unwrap()
}

fn swiglu(gate: &Value, up: &Value) -> Result<Value> {
    gated_activation(Activation::Silu, gate, up, 0)
}

fn ones_like(v: &Value) -> Tensor {
    v.tensor().ones_like().unwrap()
}

#[test]
fn gradients_that_meet_are_summed_once() {
    // y = swiglu(x, x) feeds both operands of a second gate: every value is used twice
    let x_t = random(&[3, 4], 1);
    let oracle = |t: &[Tensor]| {
        let silu = |z: &Tensor| z / (z.neg()?.exp()? + 1.0)?;
        let y = (silu(&t[0])? * &t[0])?;
        Ok(vec![(silu(&y)? * &y)?])
    };
    let leaf = Value::variable(x_t.clone());
    let want = composite(&[&leaf], oracle).unwrap();
    let dy = ones_like(&want[0]);
    let want = gradients(vec![(want[0].clone(), dy)], &[&leaf]).unwrap();

    let leaf = Value::variable(x_t.to_dtype(DType::F32).unwrap());
    let y = swiglu(&leaf, &leaf).unwrap();
    let z = swiglu(&y, &y).unwrap();
    let dz = ones_like(&z);
    let got = gradients(vec![(z, dz)], &[&leaf]).unwrap();
    assert_close(want[0].as_ref().unwrap(), got[0].as_ref().unwrap(), 1e-5, "gradient");
}

#[test]
fn a_gradient_shared_by_two_inputs_is_not_changed_in_place() {
    let x = Value::variable(f32_of(&[2, 2], 1));
    let pass = |inputs: [&Value; 2]| {
        let sum = (inputs[0].tensor() + inputs[1].tensor()).unwrap();
        one(Value::record(vec![sum], &inputs, |grads| {
            let dy = grads.into_iter().next().flatten();
            Ok(vec![dy.clone(), dy])
        }))
    };
    // s = x + x; t = s + x: the gradient of t arrives at s and x as one tensor, then x receives two more
    let s = pass([&x, &x]);
    let t = pass([&s, &x]);
    let dt = ones_like(&t);
    let got = gradients(vec![(t, dt.clone())], &[&x]).unwrap();
    assert_close(&(dt.clone() * 3.0).unwrap(), got[0].as_ref().unwrap(), 0.0, "gradient");
    assert_close(&dt.ones_like().unwrap(), &dt, 0.0, "the gradient that was handed in");
}

#[test]
fn nothing_is_recorded_without_need() {
    let x = Value::variable(f32_of(&[2, 4], 1));
    assert!(!no_grad(|| swiglu(&x, &x).unwrap()).requires_grad());
    let c = Value::constant(f32_of(&[2, 4], 1));
    assert!(!swiglu(&c, &c).unwrap().requires_grad());
}

#[test]
fn a_loss_that_is_no_scalar_is_refused() {
    assert!(backward(Value::variable(f32_of(&[2], 1))).is_err());
}
