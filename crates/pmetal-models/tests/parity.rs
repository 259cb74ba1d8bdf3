//! Logits and greedy continuations against transformers, for every fixture.

mod common;

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};
use common::{Fixture, adapt, assert_close, packed_logits, relative_error};
use pmetal_models::{Checkpoint, Checkpointing, Event, Input, KvCache, SamplingParams, Session, StopReason, generate};
use pmetal_ops::no_grad;

#[test]
fn logits_of_packed_rows_and_of_each_row_alone() {
    for fixture in Fixture::all() {
        let model = fixture.model(DType::F32, None);
        let rows = fixture.rows();
        let together = packed_logits(&*model, &rows, None);
        let checkpointed = packed_logits(&*model, &rows, Some(Checkpointing::ATTENTION));
        for (i, row) in rows.iter().enumerate() {
            let want = &fixture.expected[&format!("logits.{i}")];
            let alone = packed_logits(&*model, std::slice::from_ref(row), None);
            for (how, got) in [("packed", &together[i]), ("alone", &alone[0]), ("checkpointed", &checkpointed[i])] {
                assert_close(want, got, 1e-4, &format!("{} row {i} {how}", fixture.name));
            }
        }
    }
}

#[test]
fn logits_with_adapters() {
    for fixture in Fixture::with_plain_adapters() {
        for (folder, prefix) in [("adapter", "lora_logits"), ("adapter-rslora", "rslora_logits")] {
            if !fixture.path.join(folder).exists() {
                continue;
            }
            let mut model = fixture.model(DType::F32, None);
            adapt(&mut *model, &fixture.path.join(folder));
            for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
                let want = &fixture.expected[&format!("{prefix}.{i}")];
                assert_close(want, got, 1e-4, &format!("{} {folder} row {i}", fixture.name));
            }
        }
    }
}

/// Root mean square of the error over that of the logits. transformers' own, run in these dtypes on these fixtures: up to 0.046 and 0.0051.
#[test]
fn logits_in_half_precision() {
    // a token whose experts, or whose keys, are picked otherwise in bf16 is another token
    let picks = |fixture: &Fixture| {
        let spec = Checkpoint::open(&fixture.path).unwrap().spec().clone();
        spec.router().is_some()
    };
    for fixture in Fixture::all().into_iter().filter(|fixture| !picks(fixture)) {
        for (dtype, tolerance) in [(DType::BF16, 0.046), (DType::F16, 0.0051)] {
            let model = fixture.model(dtype, None);
            for (i, got) in packed_logits(&*model, &fixture.rows(), None).iter().enumerate() {
                let want = &fixture.expected[&format!("logits.{i}")];
                let mean_square = |t: Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
                let error = (mean_square((want - got).unwrap()) / mean_square(want.clone())).sqrt();
                assert!(error <= tolerance, "{} row {i} {dtype:?}: {error}", fixture.name);
            }
        }
    }
}

#[test]
fn greedy_continuation() {
    for fixture in Fixture::all() {
        let (model, want) = (fixture.model(DType::F32, None), fixture.ids("greedy.0"));
        let params = SamplingParams { max_tokens: want.len(), ..SamplingParams::default() };
        let mut streamed = Vec::new();
        let mut on_token = |token| {
            streamed.push(token);
            ControlFlow::Continue(())
        };
        let got = generate(&*model, &fixture.rows()[0], &params, &[], &mut on_token).unwrap();
        assert_eq!(got.tokens, want, "{}", fixture.name);
        assert_eq!(streamed, want, "{}", fixture.name);
        assert_eq!(got.stop, StopReason::Length);
    }
}

/// The log-softmax of transformers' logits behind each prefix of a row, in f64, sorted.
#[test]
fn logprobs_are_those_of_the_logits_before_any_sampling() {
    for fixture in Fixture::all() {
        let (model, row) = (fixture.model(DType::F32, None), &fixture.rows()[0]);
        let want = fixture.expected["logits.0"].to_vec2::<f32>().unwrap();
        let params =
            SamplingParams { temperature: 3.0, top_k: 40, max_tokens: 1, seed: 5, ..SamplingParams::default() };
        let params = SamplingParams { repetition_penalty: 1.5, logprobs: Some(5), ..params };
        for (read, logits) in want.iter().enumerate() {
            let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            let logprobs: Vec<f64> = logits.iter().map(|&l| f64::from(l) - sum.ln()).collect();
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            let mut seen = None;
            let mut session = Session::new(&*model).unwrap();
            let mut on_event = |event| {
                if let Event::Token { id, logprobs } = event {
                    seen = Some((id, logprobs.unwrap()));
                }
                ControlFlow::Continue(())
            };
            session.generate(&*model, &row[..=read], &params, &[], &mut on_event).unwrap();
            let (id, got) = seen.unwrap();
            let close = |id: u32, got: f64| (got - logprobs[id as usize]).abs() < 1e-3;
            assert!(close(id, got.logprob), "{}: {} is {}", fixture.name, logprobs[id as usize], got.logprob);
            assert_eq!(got.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), order[..5], "{}", fixture.name);
            assert!(got.top.iter().all(|&(id, logprob)| close(id, logprob)), "{}: {got:?}", fixture.name);
        }
    }
}

/// Rows of different lengths share a cache: read in pieces of different sizes, they give what one forward gives.
#[test]
fn a_cache_read_in_pieces() {
    for fixture in Fixture::all() {
        let (model, rows) = (fixture.model(DType::F32, None), fixture.rows());
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
            for (row, &len) in got.iter_mut().zip(&q_lens) {
                row.push(logits.narrow(0, start, len).unwrap());
                start += len;
            }
        }
        // where a row's length decides how it turns, only its last piece was read at that length
        let by_length = model.spec().ropes.iter().any(|used| used.rope.depends_on_length());
        for (i, pieces) in got.iter().enumerate() {
            let last = pieces.iter().rev().find(|piece| piece.elem_count() > 0).unwrap();
            let got = if by_length { last.clone() } else { Tensor::cat(pieces, 0).unwrap() };
            let want = &fixture.expected[&format!("logits.{i}")];
            let (all, read) = (want.dim(0).unwrap(), got.dim(0).unwrap());
            let want = want.narrow(0, all - read, read).unwrap();
            assert_close(&want, &got, 1e-4, &format!("{} row {i}", fixture.name));
        }
    }
}

#[test]
fn a_truncated_cache_continues_where_it_was_cut() {
    let fixture = Fixture::open("qwen3");
    let (model, row) = (fixture.model(DType::F32, None), &fixture.rows()[1]);
    let mut cache = KvCache::new(model.spec(), 1, row.len(), DType::F32, &model.device()).unwrap();
    let mut read = |ids: &[u32], keep: usize| {
        cache.truncate(0, keep);
        no_grad(|| model.forward(&Input::rows(ids, &[ids.len()]), Some(&mut cache)))
            .map(|hidden| hidden.tensor().clone())
    };
    read(&[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], 0).unwrap();
    read(&row[..6], 0).unwrap();
    read(&[90, 91], 6).unwrap();
    let hidden = read(&row[6..], 6).unwrap();
    let want = fixture.expected["logits.1"].narrow(0, 6, row.len() - 6).unwrap();
    assert!(relative_error(&want, &model.logits(&hidden).unwrap()) <= 1e-4);
    let error = read(&[1], row.len()).unwrap_err().to_string();
    assert!(error.contains("row 0 would hold 14 tokens, the cache has room for 13"), "{error}");
}
