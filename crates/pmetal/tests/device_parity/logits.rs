use candle_core::{DType, Device, Tensor};
use pmetal_models::{Checkpointing, Input, KvCache};

use crate::{
    common::{Fixture, adapt, assert_close, packed_logits},
    device::on_device,
};

#[test]
fn f32_logits_are_those_of_transformers() {
    on_device(|device| {
        for fixture in Fixture::all() {
            let model = fixture.model_on(device, DType::F32, None);
            for (how, checkpointing) in [("plain", None), ("checkpointed", Some(Checkpointing::ATTENTION))] {
                for (i, got) in packed_logits(&*model, &fixture.rows(), checkpointing).iter().enumerate() {
                    let want = &fixture.expected[&format!("logits.{i}")];
                    assert_close(want, got, 1e-4, &format!("{} row {i} {how}", fixture.name));
                }
            }
        }
    });
}

#[test]
fn f32_logits_with_adapters_are_those_of_peft() {
    on_device(|device| {
        for fixture in Fixture::all() {
            let mut model = fixture.model_on(device, DType::F32, None);
            adapt(&mut *model, &fixture.path.join("adapter"));
            for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
                let want = &fixture.expected[&format!("lora_logits.{i}")];
                assert_close(want, got, 1e-4, &format!("{} row {i}", fixture.name));
            }
        }
    });
}

/// Root mean square of the error over that of the logits. transformers' own, run in these dtypes on these fixtures: up to 0.046 and 0.0051.
#[test]
fn logits_in_half_precision() {
    on_device(|device| {
        let mut worst = [0f32; 2];
        for fixture in Fixture::all() {
            for (which, (dtype, tolerance)) in [(DType::BF16, 0.046), (DType::F16, 0.0051)].into_iter().enumerate() {
                let model = fixture.model_on(device, dtype, None);
                for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
                    let (want, got) = (&fixture.expected[&format!("logits.{i}")], got.to_device(&Device::Cpu).unwrap());
                    let mean_square = |t: Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
                    let error = (mean_square((want - got).unwrap()) / mean_square(want.clone())).sqrt();
                    assert!(error <= tolerance, "{} row {i} {dtype:?}: {error}", fixture.name);
                    worst[which] = worst[which].max(error);
                }
            }
        }
        eprintln!("largest errors: bf16 {}, f16 {}", worst[0], worst[1]);
    });
}

/// Rows of different lengths share a cache: read in pieces of different sizes, they give what one forward gives.
#[test]
fn a_cache_read_in_pieces() {
    on_device(|device| {
        for fixture in Fixture::all() {
            let (model, rows) = (fixture.model_on(device, DType::F32, None), fixture.rows());
            let longest = rows.iter().map(Vec::len).max().unwrap();
            let mut cache = KvCache::new(model.spec(), rows.len(), 4, DType::F32, &model.device()).unwrap();
            let mut got: Vec<Vec<Tensor>> = vec![Vec::new(); rows.len()];
            for end in [3, 4, longest] {
                let pieces: Vec<&[u32]> =
                    rows.iter().zip(cache.lens()).map(|(row, &at)| &row[at..end.min(row.len())]).collect();
                let q_lens: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
                cache.grow(end).unwrap();
                let hidden = model.forward(&Input::rows(&pieces.concat(), &q_lens), Some(&mut cache)).unwrap();
                let logits = model.logits(hidden.tensor()).unwrap();
                let mut start = 0;
                for (row, &len) in got.iter_mut().zip(&q_lens) {
                    row.push(logits.narrow(0, start, len).unwrap());
                    start += len;
                }
            }
            for (i, pieces) in got.iter().enumerate() {
                let want = &fixture.expected[&format!("logits.{i}")];
                assert_close(want, &Tensor::cat(pieces, 0).unwrap(), 1e-4, &format!("{} row {i}", fixture.name));
            }
        }
    });
}
