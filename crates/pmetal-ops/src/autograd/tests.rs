use candle_core::{DType, Device, Tensor};

use super::*;
use crate::{
    Activation, Arena, AttentionSpec, LinearGroup, LinearMember, Rows, Weight, attention, gated_activation, rms_norm,
    testing::{assert_close, random},
};

fn f32_of(shape: &[usize], seed: u64) -> Tensor {
    random(shape, seed).to_dtype(DType::F32).unwrap()
}

fn swiglu(gate: &Value, up: &Value) -> Result<Value> {
    gated_activation(Activation::Silu, gate, up)
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

/// A block with a trained product, attention and a norm.
fn block(v: &[Value], weight: &Weight, attended: &std::sync::atomic::AtomicUsize) -> Result<Vec<Value>> {
    let spec = AttentionSpec { heads: 2, kv_heads: 2, head_dim: 3, scale: 0.6 };
    let group = LinearGroup { members: vec![LinearMember { weight: weight.clone(), bias: None, adapter: None }] };
    let x = rms_norm(&v[0], &v[1], 1e-5)?;
    let q = one(group.forward(&x, None)?).reshape((5, 2, 3))?;
    attended.fetch_add(1, Ordering::Relaxed);
    Ok(vec![attention(&q, &q, &q, &Rows::packed(&[2, 3]), spec)?])
}

#[test]
fn checkpointed_gradients_are_the_same_bits() {
    let weight_t = f32_of(&[6, 6], 3);
    let run = |policy: Option<Policy>| {
        let arena = Arena::new(&[("w".into(), weight_t.shape().clone())], DType::F32, &Device::Cpu).unwrap();
        let param = arena.param("w").unwrap();
        param.set(&weight_t).unwrap();
        let weight = Weight::Trainable(param.clone());
        let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let leaves = [Value::variable(f32_of(&[5, 6], 1)), Value::constant(f32_of(&[6], 2))];
        let y = match policy {
            None => block(&leaves, &weight, &calls).unwrap(),
            Some(policy) => {
                let calls = calls.clone();
                checkpoint(policy, &[&leaves[0], &leaves[1]], move |v| block(v, &weight, &calls)).unwrap()
            }
        };
        let dy = f32_of(&[5, 2, 3], 4);
        let dx = gradients(vec![(y[0].clone(), dy)], &[&leaves[0]]).unwrap().remove(0).unwrap();
        let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (bits(y[0].tensor()), bits(&dx), bits(&param.grad().unwrap()), calls.load(Ordering::Relaxed))
    };
    let plain = run(None);
    for policy in [Policy::KeepNothing, Policy::KeepAttention] {
        let again = run(Some(policy));
        assert_eq!((&plain.0, &plain.1, &plain.2), (&again.0, &again.1, &again.2), "{policy:?}");
        assert_eq!((plain.3, again.3), (1, 2), "the block runs a second time in backward");
    }
}

#[test]
fn what_a_policy_keeps_is_not_computed_again() {
    for (policy, runs) in [(Policy::KeepNothing, 2), (Policy::KeepAttention, 1)] {
        let computed = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let x = Value::variable(f32_of(&[2], 1));
        let count = computed.clone();
        let y = checkpoint(policy, &[&x], move |v| {
            let results = keep("attention", || {
                count.fetch_add(1, Ordering::Relaxed);
                Ok(vec![v[0].tensor().clone()])
            })?;
            Ok(Value::record(results, &[&v[0]], Ok))
        })
        .unwrap();
        let dy = ones_like(&y[0]);
        assert!(gradients(vec![(y[0].clone(), dy)], &[&x]).unwrap()[0].is_some());
        assert_eq!(computed.load(Ordering::Relaxed), runs, "{policy:?}");
    }
}

#[test]
fn a_loss_that_is_no_scalar_is_refused() {
    assert!(backward(Value::variable(f32_of(&[2], 1))).is_err());
}
