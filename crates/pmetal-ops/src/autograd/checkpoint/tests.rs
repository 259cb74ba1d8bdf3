use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::{
    Adapter, Arena, AttentionSpec, LinearGroup, LinearMember, Reach, RmsNorm, Rows, Weight, attention,
    autograd::one,
    rms_norm_beside,
    testing::{emulated, random},
};

fn f32_of(shape: &[usize], seed: u64) -> Tensor {
    random(shape, seed).to_dtype(DType::F32).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The projection that is q, k and v at once, and the one that ends the block; each frozen, with a trained adapter.
fn groups(arena: &Arena) -> [LinearGroup; 2] {
    [("in", 5), ("out", 6)].map(|(name, seed)| {
        let half = |name: String| Weight::Trainable(arena.param(&name).unwrap());
        let (a, b) = (half(format!("{name}.a")), half(format!("{name}.b")));
        let adapter = Some(Adapter { a, b, scale: 0.5, dropout: 0.2, place: seed });
        LinearGroup::new(vec![LinearMember { weight: Weight::Frozen(f32_of(&[6, 6], seed)), bias: None, adapter }])
            .unwrap()
    })
}

/// A norm, a projection, attention and another projection: the two parts of the next stream.
fn block(v: &[Value], [before, behind]: &[LinearGroup; 2], runs: &AtomicUsize) -> Result<Vec<Value>> {
    let spec = AttentionSpec { heads: 2, kv_heads: 2, head_dim: 3, scale: 0.6, reach: Reach::All, softcap: None };
    let (x, normed) = rms_norm_beside(&v[0], &v[1], RmsNorm::new(1e-5), before.spare_columns())?;
    let q = one(saved(Saved::Projections, || before.forward(&normed, Some(1)))?);
    runs.fetch_add(1, Ordering::Relaxed);
    let rows = Rows::packed(&[2, 3]);
    let y = saved(Saved::Attention, || attention(&q, &q, &q, None, &rows, spec, behind.spare_columns()))?;
    Ok(vec![x, one(last(|| behind.forward(&y, Some(2)))?)])
}

/// What two blocks on one another give: their sum, the gradient of what they read, those of the adapters; and how often a block ran.
fn run(policy: Option<Policy>) -> (Vec<u32>, Vec<u32>, Vec<u32>, usize) {
    let names = ["in.a", "in.b", "out.a", "out.b"];
    let shapes = names.map(|name| (name.to_owned(), if name.ends_with('a') { (2, 6).into() } else { (6, 2).into() }));
    let arena = Arena::new(&shapes, DType::F32, &Device::Cpu).unwrap();
    for (param, seed) in arena.params().zip(10..) {
        param.set(&f32_of(param.value().dims(), seed)).unwrap();
    }
    let runs = Arc::new(AtomicUsize::new(0));
    let (x, weight) = (Value::variable(f32_of(&[5, 6], 1)), Value::constant(f32_of(&[6], 2)));
    let mut stream = x.clone();
    for _ in 0..2 {
        let (groups, count) = (groups(&arena), runs.clone());
        let parts = match policy {
            None => block(&[stream, weight.clone()], &groups, &count).unwrap(),
            Some(policy) => checkpoint(policy, &[&stream, &weight], move |v| block(v, &groups, &count)).unwrap(),
        };
        let sum = (parts[0].tensor() + parts[1].tensor()).unwrap();
        stream = one(Value::record(vec![sum], &[&parts[0], &parts[1]], |grads| {
            let dy = grads.into_iter().next().flatten();
            Ok(vec![dy.clone(), dy])
        }));
    }
    let (y, dy) = (stream.tensor().clone(), f32_of(&[5, 6], 4));
    let dx = gradients(vec![(stream, dy)], &[&x]).unwrap().remove(0).unwrap();
    (bits(&y), bits(&dx), bits(arena.grads().unwrap()), runs.load(Ordering::Relaxed))
}

fn policies() -> impl Iterator<Item = Policy> {
    let results = [Saved::Projections, Saved::Attention];
    [Fate::Recompute, Fate::Keep, Fate::Host].into_iter().flat_map(move |fate| {
        let inputs = if fate == Fate::Host { Fate::Host } else { Fate::Keep };
        let policy = Policy::INPUTS.with(Saved::Input, inputs);
        [
            policy.with(results[0], fate),
            policy.with(results[1], fate),
            policy.with(results[0], fate).with(results[1], fate),
        ]
    })
}

#[test]
fn results_and_gradients_are_the_same_bits_with_every_policy() {
    let all = || {
        let plain = run(None);
        assert_eq!(plain.3, 2);
        for policy in policies() {
            let again = run(Some(policy));
            assert_eq!((&plain.0, &plain.1, &plain.2), (&again.0, &again.1, &again.2), "{policy:?}");
            assert_eq!(again.3, 4, "each block runs a second time in backward");
        }
    };
    all();
    emulated(all);
}

#[test]
fn what_a_policy_keeps_is_not_computed_again() {
    for (fate, runs) in [(Fate::Recompute, 2), (Fate::Keep, 1), (Fate::Host, 1)] {
        let computed = Arc::new(AtomicUsize::new(0));
        let x = Value::variable(f32_of(&[2], 1));
        let count = computed.clone();
        let run = move || {
            let y = checkpoint(Policy::INPUTS.with(Saved::Attention, fate), &[&x], move |v| {
                let results = saved(Saved::Attention, || {
                    keep("an operation", || {
                        count.fetch_add(1, Ordering::Relaxed);
                        Ok(vec![v[0].tensor().copy()?])
                    })
                })?;
                Ok(Value::record(results, &[&v[0]], Ok))
            })
            .unwrap();
            let dy = y[0].tensor().ones_like().unwrap();
            assert!(gradients(vec![(y[0].clone(), dy)], &[&x]).unwrap()[0].is_some());
        };
        emulated(run);
        assert_eq!(computed.load(Ordering::Relaxed), runs, "{fate:?}");
    }
}

#[test]
fn what_ends_a_function_is_not_computed_again_and_takes_no_memory() {
    let x = Value::variable(f32_of(&[4, 3], 1));
    let y = checkpoint(Policy::INPUTS, &[&x], |v| {
        let stand_in = last(|| unread((4, 3), DType::F32, &Device::Cpu))?;
        let second = with_recording(true, || v[0].requires_grad());
        assert_eq!(stand_in.is_some(), second);
        assert!(unread((4, 3), DType::F32, &Device::Cpu)?.is_none(), "only where it was said");
        Ok(Value::record(vec![stand_in.map_or_else(|| v[0].tensor().copy(), Ok)?], &[&v[0]], Ok))
    })
    .unwrap();
    assert_eq!(bits(y[0].tensor()), bits(x.tensor()));
    let dy = f32_of(&[4, 3], 2);
    let dx = gradients(vec![(y[0].clone(), dy.clone())], &[&x]).unwrap().remove(0).unwrap();
    assert_eq!(bits(&dx), bits(&dy));
}

#[test]
fn a_second_run_that_does_something_else_is_refused() {
    let x = Value::variable(f32_of(&[2], 1));
    let runs = AtomicUsize::new(0);
    let y = checkpoint(Policy::INPUTS.with(Saved::Gates, Fate::Keep), &[&x], move |v| {
        let op = ["one", "another"][runs.fetch_add(1, Ordering::Relaxed)];
        let results = saved(Saved::Gates, || keep(op, || Ok(vec![v[0].tensor().clone()])))?;
        Ok(Value::record(results, &[&v[0]], Ok))
    })
    .unwrap();
    let dy = y[0].tensor().ones_like().unwrap();
    let error = gradients(vec![(y[0].clone(), dy)], &[&x]).unwrap_err().to_string();
    assert!(error.contains("another") && error.contains("one"), "{error}");
}
