use candle_core::{DType, Device, Tensor};
use pmetal::lora::{AdapterFile, Use, attach_file};
use pmetal_models::{Checkpoint, Checkpointing, Input, KvCache};

use crate::{
    common::{Fixture, assert_close, packed_logits},
    device::on_each,
};

/// Whether tokens pick experts or keys: one that picks others because its numbers were rounded is another token.
pub fn picks(fixture: &Fixture) -> bool {
    Checkpoint::open(&fixture.path).unwrap().spec().router().is_some()
}

/// Whether a row's length decides how its tokens turn.
pub fn turns_by_length(fixture: &Fixture) -> bool {
    Checkpoint::open(&fixture.path).unwrap().spec().ropes.iter().any(|used| used.rope.depends_on_length())
}

#[test]
fn f32_logits_are_those_of_transformers() {
    on_each(
        |_| true,
        |device, fixture| {
            let model = fixture.model_on(device, DType::F32, None);
            for (how, checkpointing) in [("plain", None), ("checkpointed", Some(Checkpointing::ATTENTION))] {
                for (i, got) in packed_logits(&*model, &fixture.rows(), checkpointing).iter().enumerate() {
                    let want = &fixture.expected[&format!("logits.{i}")];
                    assert_close(want, got, 1e-4, &format!("{} row {i} {how}", fixture.name));
                }
            }
        },
    );
}

#[test]
fn f32_logits_with_adapters_are_those_of_peft() {
    on_each(
        |_| true,
        |device, fixture| {
            let mut model = fixture.model_on(device, DType::F32, None);
            let adapter = AdapterFile::open(&fixture.path.join("adapter")).unwrap();
            attach_file(&mut *model, &adapter, Use::Inference).unwrap();
            for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
                let want = &fixture.expected[&format!("lora_logits.{i}")];
                assert_close(want, got, 1e-4, &format!("{} row {i}", fixture.name));
            }
        },
    );
}

/// Root mean square of the error over that of the logits: the most of transformers' own, run in bf16 and in f16 on these fixtures.
pub const BF16_LOGITS: f32 = 0.046;
const F16_LOGITS: f32 = 0.0051;

#[test]
fn logits_in_half_precision() {
    for (dtype, tolerance) in [(DType::BF16, BF16_LOGITS), (DType::F16, F16_LOGITS)] {
        on_each(
            |fixture| !picks(fixture),
            |device, fixture| {
                let model = fixture.model_on(device, dtype, None);
                for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
                    let (want, got) = (&fixture.expected[&format!("logits.{i}")], got.to_device(&Device::Cpu).unwrap());
                    let mean_square = |t: Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
                    let error = (mean_square((want - got).unwrap()) / mean_square(want.clone())).sqrt();
                    assert!(error <= tolerance, "{} row {i} {dtype:?}: {error}", fixture.name);
                }
            },
        );
    }
}

/// Rows of different lengths share a cache: read in pieces of different sizes, they give what one forward gives.
#[test]
fn a_cache_read_in_pieces() {
    on_each(
        |_| true,
        |device, fixture| {
            let (model, rows) = (fixture.model_on(device, DType::F32, None), fixture.rows());
            let longest = rows.iter().map(Vec::len).max().unwrap();
            let mut cache = KvCache::new(model.spec(), rows.len(), 4, DType::F32, &model.device()).unwrap();
            let mut got: Vec<Vec<Tensor>> = vec![Vec::new(); rows.len()];
            for end in [3, 4, 9, longest] {
                let pieces: Vec<&[u32]> =
                    rows.iter().zip(cache.lens()).map(|(row, &at)| &row[at..end.min(row.len())]).collect();
                let q_lens: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
                cache.grow(end).unwrap();
                let hidden = model.forward(&Input::rows(&pieces.concat(), &q_lens), Some(&mut cache)).unwrap();
                let logits = model.logits(hidden.tensor()).unwrap();
                let mut start = 0;
                for (row, &len) in got.iter_mut().zip(&q_lens).filter(|(_, len)| **len > 0) {
                    row.push(logits.narrow(0, start, len).unwrap());
                    start += len;
                }
            }
            // only the last piece of such a row was read at its length
            let by_length = turns_by_length(fixture);
            for (i, mut pieces) in got.into_iter().enumerate() {
                pieces.drain(..if by_length { pieces.len() - 1 } else { 0 });
                let got = Tensor::cat(&pieces, 0).unwrap();
                let (want, read) = (&fixture.expected[&format!("logits.{i}")], got.dim(0).unwrap());
                let want = want.narrow(0, want.dim(0).unwrap() - read, read).unwrap();
                assert_close(&want, &got, 1e-4, &format!("{} row {i}", fixture.name));
            }
        },
    );
}
