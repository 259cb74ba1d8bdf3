//! Eight optimizer steps against PEFT and torch: see `scripts/parity/sft.py` for how the fixtures were made.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use candle_core::{DType, Device, Tensor, safetensors};
use pmetal_data::{Example, Examples};
use pmetal_lora::{AdapterFile, Use, attach_file};
use pmetal_models::{CausalLMModel, Checkpoint, Checkpointing, load, parameters_of};
use pmetal_ops::Arena;
use pmetal_trainer::{
    Epochs, LoopSettings, MetricsFile, Observer, Schedule, SchedulerType, StepMetrics, StepSettings, TrainingData,
    train,
};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn checkpoint(model: &str) -> Checkpoint {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pmetal-models/tests/fixtures");
    Checkpoint::open(&models.join(model)).unwrap()
}

fn rows() -> Vec<Example> {
    let text = fs::read_to_string(fixtures().join("rows.jsonl")).unwrap();
    let row = |line: &str| {
        let json: Value = serde_json::from_str(line).unwrap();
        let numbers = |key: &str| json[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>();
        Example { input_ids: numbers("input_ids").iter().map(|&x| x as u32).collect(), labels: numbers("labels") }
    };
    text.lines().map(row).collect()
}

#[derive(Default)]
struct Log(Vec<StepMetrics>);

impl Observer for Log {
    fn step(&mut self, metrics: &StepMetrics) {
        self.0.push(metrics.clone());
    }
}

/// Batches of rows as they come.
struct InOrder {
    rows: usize,
    batch: usize,
}

impl Epochs for InOrder {
    fn batches(&self) -> usize {
        self.rows.div_ceil(self.batch)
    }

    fn epoch(&self, _: usize) -> Box<dyn Iterator<Item = Vec<usize>> + '_> {
        let rows = (0..self.rows).collect::<Vec<_>>();
        Box::new(rows.chunks(self.batch).map(<[usize]>::to_vec).collect::<Vec<_>>().into_iter())
    }
}

/// How the rows of a step are spread.
#[derive(Clone, Copy, Default)]
struct Variant {
    checkpointing: Option<Checkpointing>,
    /// Micro-batches of one row each, as many as the step has rows.
    one_by_one: bool,
}

/// Trains as the fixture's `settings` say.
fn run(model: &dyn CausalLMModel, arena: &Arena, settings: &Value, variant: Variant) -> Vec<StepMetrics> {
    let number = |key: &str| settings[key].as_f64().unwrap();
    let count = |key: &str| settings[key].as_u64().unwrap() as usize;
    let rows = Examples::from(rows());
    let per_step = count("batch_size") * count("gradient_accumulation_steps");
    let (batch, accumulation) =
        if variant.one_by_one { (1, per_step) } else { (count("batch_size"), count("gradient_accumulation_steps")) };
    let order = InOrder { rows: rows.len(), batch };
    let kind = match settings["scheduler"].as_str().unwrap() {
        "linear" => SchedulerType::Linear,
        "cosine" => SchedulerType::Cosine,
        other => panic!("{other}"),
    };
    let settings = LoopSettings {
        epochs: 1.0,
        max_steps: count("steps"),
        gradient_accumulation_steps: accumulation,
        schedule: Schedule { kind, peak: number("learning_rate"), warmup_steps: count("warmup_steps"), total_steps: 0 },
        warmup_ratio: 0.0,
        eval_steps: 0,
        step: StepSettings {
            max_grad_norm: number("max_grad_norm"),
            weight_decay: number("weight_decay"),
            checkpointing: variant.checkpointing,
            logits_bytes: 1 << 20,
            seed: 0,
        },
    };
    let folder = tempfile::tempdir().unwrap();
    let mut metrics = MetricsFile::create(&folder.path().join("metrics.jsonl")).unwrap();
    let mut log = Log::default();
    let data = TrainingData { rows: &rows, eval_rows: &Examples::default(), order: &order };
    train(model, arena, &data, &settings, &mut metrics, &mut log, &AtomicBool::new(false)).unwrap();
    log.0
}

fn expect_log(log: &[StepMetrics], expected: &Value, what: &str) {
    assert_eq!(log.len(), expected["losses"].as_array().unwrap().len());
    for (i, m) in log.iter().enumerate() {
        let near = |got: f64, key: &str, tolerance: f64| {
            let want = expected[key][i].as_f64().unwrap();
            assert!((got - want).abs() <= tolerance * want.abs(), "{what}, step {i}, {key}: {got} instead of {want}");
        };
        near(m.loss, "losses", 1e-4);
        near(m.grad_norm, "grad_norms", 1e-3);
        near(m.learning_rate, "learning_rates", 1e-9);
    }
}

/// Largest difference relative to the tensor's largest magnitude, at most `tolerance`.
fn expect_tensor(got: &Tensor, want: &Tensor, tolerance: f32, what: &str) {
    let read = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (got, want) = (read(got), read(want));
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance * scale, "{what}: differs by {worst:e} where the largest value is {scale:e}");
}

fn expected(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap()
}

fn lora_runs(model_name: &str, variant: Variant) {
    let folder = fixtures().join("sft-lora").join(model_name);
    let start = AdapterFile::open(&folder.join("start_adapter")).unwrap();
    for (name, expected) in expected(&folder).as_object().unwrap() {
        let mut model = load(&checkpoint(model_name), DType::F32, &Device::Cpu, None).unwrap();
        let arena = attach_file(model.as_mut(), &start, Use::Training).unwrap().unwrap();
        let log = run(model.as_ref(), &arena, &expected["settings"], variant);
        expect_log(&log, expected, &format!("{model_name}/{name}"));
        let end = folder.join(format!("{name}_adapter"));
        if !end.exists() {
            continue;
        }
        let end = AdapterFile::open(&end).unwrap();
        for param in arena.params() {
            let what = format!("{model_name}/{name} {}", param.name());
            expect_tensor(param.master(), &end.tensors[param.name()], 2e-3, &what);
        }
    }
}

/// The folders of `kind`.
fn models(kind: &str) -> Vec<String> {
    let entries = fs::read_dir(fixtures().join(kind)).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn lora_steps_of_every_family_equal_pefts() {
    let models = models("sft-lora");
    assert!(models.len() >= 18, "{models:?}");
    models.iter().for_each(|model| lora_runs(model, Variant::default()));
}

#[test]
fn checkpointed_and_accumulated_steps_equal_pefts_too() {
    lora_runs("llama", Variant { checkpointing: Some(Checkpointing::INPUTS), one_by_one: false });
    lora_runs("qwen3", Variant { checkpointing: Some(Checkpointing::ATTENTION), one_by_one: true });
}

#[test]
fn steps_with_tables_beside_the_adapter_equal_pefts() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pmetal-lora/tests/fixtures");
    for name in ["untied", "tied", "tied-embedding-alone", "grown-tied"] {
        let start = AdapterFile::open(&cases.join(name).join("adapter")).unwrap();
        let expected = expected(&cases.join(name));
        let mut model = load(&checkpoint(&start.base), DType::F32, &Device::Cpu, None).unwrap();
        let arena = attach_file(model.as_mut(), &start, Use::Training).unwrap().unwrap();
        let log = run(model.as_ref(), &arena, &expected["settings"], Variant::default());
        expect_log(&log, &expected, name);
        let end = AdapterFile::open(&cases.join(name).join("end_adapter")).unwrap();
        for param in arena.params() {
            expect_tensor(param.master(), &end.tensors[param.name()], 2e-3, &format!("{name}, {}", param.name()));
        }
    }
}

fn full_run(model_name: &str) {
    let folder = fixtures().join("sft-full").join(model_name);
    let expected = &expected(&folder)["linear"];
    let end = folder.join("linear.safetensors");
    let end = end.exists().then(|| safetensors::load(end, &Device::Cpu).unwrap());
    for variant in [Variant::default(), Variant { checkpointing: Some(Checkpointing::INPUTS), one_by_one: true }] {
        let checkpoint = checkpoint(model_name);
        let arena = Arena::new(&parameters_of(checkpoint.spec()).unwrap(), DType::F32, &Device::Cpu).unwrap();
        let model = load(&checkpoint, DType::F32, &Device::Cpu, Some(&arena)).unwrap();
        let log = run(model.as_ref(), &arena, &expected["settings"], variant);
        expect_log(&log, expected, model_name);
        let Some(end) = &end else { continue };
        assert_eq!(arena.params().count(), end.len());
        for param in arena.params() {
            expect_tensor(param.master(), &end[param.name()], 2e-3, param.name());
        }
    }
}

#[test]
fn full_fine_tuning_equals_torchs() {
    let models = models("sft-full");
    assert!(models.len() >= 7, "{models:?}");
    models.iter().for_each(|model| full_run(model));
}
