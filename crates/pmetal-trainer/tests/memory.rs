//! Which results survive a step within a limit of memory.

use pmetal_models::{DecoderSpec, MlpSpec, spec_of};
use pmetal_ops::{DeviceRates, Fate, Saved};
use pmetal_trainer::{MemoryChoice, StepSize, parse_bytes};

const GIB: u64 = 1 << 30;
const RATES: DeviceRates = DeviceRates { product: 7e14, host: 5e10 };

fn spec(file: &str) -> DecoderSpec {
    let path = format!("{}/../../scripts/bench/{file}.json", env!("CARGO_MANIFEST_DIR"));
    spec_of(&serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()).unwrap()
}

/// A public model, of those whose parameters are counted.
fn public(name: &str) -> DecoderSpec {
    spec(&format!("../../crates/pmetal-models/tests/configs/{name}"))
}

fn size(spec: &DecoderSpec) -> StepSize<'_> {
    StepSize { spec, width: 2, rank: 16, tokens: 8192, longest: 2048 }
}

/// How many layers compute each result again.
fn computed(choice: &MemoryChoice, layers: usize) -> [usize; Saved::ALL.len()] {
    Saved::ALL.map(|saved| {
        let policies = (0..layers).filter_map(|i| choice.checkpointing?.policy(i, layers));
        policies.filter(|policy| saved != Saved::Input && policy.fate(saved) == Fate::Recompute).count()
    })
}

#[test]
fn nothing_runs_again_where_memory_suffices() {
    let spec = spec("qwen3-0.6b");
    let choice = size(&spec).choose(Some(20 * GIB), false, Some(RATES));
    assert!(choice.checkpointing.is_none() && choice.fits);
    assert_eq!(choice.line(28, 0), None);
    assert!(size(&spec).choose(None, false, Some(RATES)).checkpointing.is_none());
    assert!(size(&spec).choose(Some(20 * GIB), true, Some(RATES)).checkpointing.is_some(), "unless it is asked for");
}

#[test]
fn more_memory_means_less_is_computed_again_and_the_limit_holds() {
    for file in ["llama-3.1-8b", "qwen3-0.6b"] {
        let spec = spec(file);
        let (size, layers) = (size(&spec), spec.num_hidden_layers());
        for rates in [Some(RATES), None] {
            let least = size.choose(None, true, rates);
            assert!(!size.choose(Some(least.bytes / 2), false, rates).fits, "{file}");
            let mut before = usize::MAX;
            for eighths in [9, 10, 12, 16, 24, 48, 96] {
                let limit = least.bytes * eighths / 8;
                let choice = size.choose(Some(limit), false, rates);
                assert!(choice.fits && choice.bytes <= limit, "{file} within {limit}: {choice:?}");
                assert!((128 << 20..=256 << 20).contains(&choice.logits_bytes));
                let again = computed(&choice, layers).iter().sum();
                assert!(
                    again <= before,
                    "{file} within {limit}: {again} results are computed again, {before} with less"
                );
                before = again;
            }
        }
    }
}

#[test]
fn each_layer_counts_for_itself() {
    let bytes = |spec: &DecoderSpec| size(spec).choose(None, false, None).bytes;
    let whole = public("deepseek-v3");
    let with = |layers: &[usize]| {
        let layers = layers.iter().map(|&layer| whole.layers[layer].clone()).collect();
        bytes(&DecoderSpec { layers, ..whole.clone() })
    };
    // the first three layers have no experts
    let (dense, experts, both) = (with(&[0, 0]), with(&[3, 3]), with(&[0, 3]));
    assert!(dense < experts && dense < both && both < experts, "{dense}, {both}, {experts}");

    let mut moe = public("qwen3-30b-a3b");
    let before = bytes(&moe);
    for layer in &mut moe.layers {
        if let MlpSpec::Experts(experts) = &mut layer.mlp {
            experts.router.top_k *= 2;
        }
    }
    // rows of 8 experts more: what they read and return, gate, up and their product, and products of adapters
    let (tokens, width, hidden, inner) = (8192, 2, 2048, 768);
    let more = 48 * tokens * width * 8 * (2 * hidden + 3 * inner + 2 * 16) as u64;
    let found = bytes(&moe) - before;
    assert!(found > more && found < more * 11 / 10, "{found} instead of {more} and a little");
}

#[test]
fn the_host_holds_what_copies_can_keep_up_with() {
    let spec = spec("llama-3.1-8b");
    let size = size(&spec);
    let choice = size.choose(Some(2 * GIB), false, Some(RATES));
    let policy = choice.checkpointing.unwrap().policy;
    assert!(choice.fits && choice.host_bytes > 0);
    assert_eq!(policy.fate(Saved::Input), Fate::Host);
    // 5.8 ms of a layer's forward at 50 GB/s do not carry 470 MB
    assert_ne!(policy.fate(Saved::Gates), Fate::Host);
    // the last layer runs again at once: nothing of it leaves
    let last = choice.checkpointing.unwrap().policy(31, 32).unwrap();
    assert!(Saved::ALL.iter().all(|&saved| last.fate(saved) != Fate::Host));

    let alone = size.choose(Some(2 * GIB), false, None);
    assert_eq!(alone.host_bytes, 0);
    assert!(!alone.fits, "without the host the streams alone take 2 GiB");
}

#[test]
fn what_was_chosen_is_said_in_one_line() {
    let spec = spec("llama-3.1-8b");
    let line = size(&spec).choose(Some(2 * GIB), false, Some(RATES)).line(32, 15 * GIB).unwrap();
    for words in
        ["of 32 layers run again", "computed again: ", "gate and up", "at rest with the host", "inputs", "GiB in all"]
    {
        assert!(line.contains(words), "{line}");
    }
    assert!(!line.contains('\n'));
}

#[test]
fn bytes_are_read_with_their_units() {
    for (text, bytes) in
        [("17.8GiB", 19_112_604_467), ("2 gib", 2 * GIB), ("16G", 16 * GIB), ("1.5GB", 1_500_000_000), ("4096", 4096)]
    {
        assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
    }
    for text in ["", "GiB", "-1GiB", "12 parsecs", "inf"] {
        assert!(parse_bytes(text).is_err(), "{text}");
    }
}
