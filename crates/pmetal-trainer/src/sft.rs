//! Supervised fine-tuning from paths to paths: read the rows and the model, train, evaluate, write, read back.

use std::{fs, path::Path, sync::atomic::AtomicBool};

use candle_core::{DType, Device, Tensor};
use pmetal_data::{Example, Tokenizer};
use pmetal_lora::{AdapterFile, LoraConfig, Use, attach, attach_file};
use pmetal_models::{
    CausalLMModel, Checkpoint, DecoderSpec, Input, dtype_of, load, random, read_config, save_pretrained, spec_of,
    tensors_of,
};
use pmetal_ops::{Arena, Policy, no_grad};

use crate::{
    Error, FineTuneType, LoopSettings, MetricsFile, Observer, Result, Schedule, SftOptions, StepSettings, Summary,
    TrainingData,
    rows::{Batches, Rows},
    train,
};

/// Largest file of a model that is written.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;
const GENERATION_CONFIG: &str = "generation_config.json";

/// What a run left in its output folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// A PEFT adapter.
    Adapter,
    /// A Hugging Face model.
    Model,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The figures.
    pub summary: Summary,
    /// What lies in the output folder.
    pub written: Written,
}

/// What is trained, and what is written of it.
enum Trained {
    Adapter(Arena, LoraConfig),
    Everything(Arena),
}

impl Trained {
    fn arena(&self) -> &Arena {
        match self {
            Self::Adapter(arena, _) | Self::Everything(arena) => arena,
        }
    }
}

/// Runs supervised fine-tuning as `options` say. `stop` ends it after the step under way, and what was trained is written.
pub fn sft(options: &SftOptions, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
    options.validate()?;
    let base = Base::open(options)?;
    let tokenizer = Tokenizer::find(&options.model)?;
    let rows = Rows::read(options, base.spec.vocab_size, tokenizer.as_ref(), observer, stop)?;
    let batches = Batches::new(options, &rows.train)?;
    describe(options, &rows, &batches, observer);
    make_output(&options.output)?;

    let dtype = options.dtype.resolve(base.stored_dtype);
    let (model, trained) = prepare(options, &base, dtype, &options.device.resolve())?;
    let arena = trained.arena();
    let total: usize = model.named_weights().iter().map(|(_, w)| w.shape().elem_count()).sum();
    observer.note(&format!("training {} parameters of a model of {total} in {}", arena.len(), dtype.as_str()));

    // not before all else is known to be right: a run that cannot start leaves the metrics of the last one alone
    let mut metrics = MetricsFile::create(&options.output.join("metrics.jsonl"))?;
    let data = TrainingData { rows: &rows.train, eval_rows: &rows.eval, order: &batches };
    let summary = train(model.as_ref(), arena, &data, &loop_settings(options), &mut metrics, observer, stop)?;
    let written = write(options, &base, tokenizer.as_ref(), model.as_ref(), &trained, dtype, &rows.train.get(0)?)?;
    Ok(Outcome { summary, written })
}

/// Says what will be trained on.
fn describe(options: &SftOptions, rows: &Rows, batches: &Batches, observer: &mut dyn Observer) {
    observer.note(&rows.report.to_string());
    if !rows.eval.is_empty() {
        observer.note(&format!("{} rows to train on, {} to evaluate on", rows.train.len(), rows.eval.len()));
    }
    if let Some(packing) = &batches.packing {
        observer.note(&format!(
            "packing: {} rows in {} packs of {} tokens, {:.2} % filled (the last pack aside)",
            rows.train.len(),
            packing.len(),
            options.data.max_seq_len,
            packing.efficiency * 100.0
        ));
    }
}

fn make_output(folder: &Path) -> Result<()> {
    if folder.is_file() {
        return Err(Error::OutputIsFile { path: folder.to_path_buf() });
    }
    Ok(fs::create_dir_all(folder).map_err(pmetal_core::Error::io("create", folder))?)
}

/// Where a run starts: a checkpoint, or a configuration alone.
struct Base {
    config: serde_json::Value,
    spec: DecoderSpec,
    stored_dtype: DType,
    checkpoint: Option<Checkpoint>,
}

impl Base {
    fn open(options: &SftOptions) -> Result<Self> {
        if options.from_scratch {
            let config = read_config(&options.model)?;
            let stored_dtype = dtype_of(&config).unwrap_or(DType::BF16);
            return Ok(Self { spec: spec_of(&config)?, config, stored_dtype, checkpoint: None });
        }
        let checkpoint = Checkpoint::open(&options.model)?;
        let (config, stored_dtype) = (checkpoint.config().clone(), checkpoint.stored_dtype());
        Ok(Self { config, spec: checkpoint.spec().clone(), stored_dtype, checkpoint: Some(checkpoint) })
    }
}

fn loop_settings(options: &SftOptions) -> LoopSettings {
    LoopSettings {
        epochs: options.epochs,
        max_steps: options.max_steps,
        gradient_accumulation_steps: options.gradient_accumulation_steps,
        schedule: Schedule {
            kind: options.lr_scheduler_type,
            peak: options.learning_rate,
            warmup_steps: options.warmup_steps,
            total_steps: 0,
        },
        warmup_ratio: options.warmup_ratio,
        eval_steps: options.eval_steps,
        step: StepSettings {
            max_grad_norm: options.max_grad_norm,
            weight_decay: options.weight_decay,
            checkpointing: options.gradient_checkpointing.then_some(Policy::KeepNothing),
            seed: options.seed,
        },
    }
}

/// The model with its adapter, or with every weight in an arena.
fn prepare(
    options: &SftOptions,
    base: &Base,
    dtype: DType,
    device: &Device,
) -> Result<(Box<dyn CausalLMModel>, Trained)> {
    let Some(checkpoint) = &base.checkpoint else {
        let arena = Arena::new(&tensors_of(&base.spec), dtype, device)?;
        let model = random(&base.config, dtype, device, options.seed, Some(&arena))?;
        return Ok((model, Trained::Everything(arena)));
    };
    if options.fine_tune_type == FineTuneType::Full {
        let arena = Arena::new(&checkpoint.tensors(), dtype, device)?;
        return Ok((load(checkpoint, dtype, device, Some(&arena))?, Trained::Everything(arena)));
    }
    let mut model = load(checkpoint, dtype, device, None)?;
    let Some(path) = &options.lora else {
        let config = options.lora_config();
        let arena = attach(model.as_mut(), &config, options.seed)?;
        return Ok((model, Trained::Adapter(arena, config)));
    };
    let mut file = AdapterFile::open(path)?;
    if let Some(dropout) = options.lora_dropout {
        file.config.lora_dropout = dropout;
        file.config.validate()?;
    }
    let arena = attach_file(model.as_mut(), &file, Use::Training)?;
    let arena = arena.ok_or_else(|| Error::NoSteps { reason: format!("{} has no tensors", path.display()) })?;
    Ok((model, Trained::Adapter(arena, file.config)))
}

fn write(
    options: &SftOptions,
    base: &Base,
    tokenizer: Option<&Tokenizer>,
    model: &dyn CausalLMModel,
    trained: &Trained,
    dtype: DType,
    row: &Example,
) -> Result<Written> {
    let output = &options.output;
    match trained {
        Trained::Adapter(arena, config) => {
            pmetal_lora::save(output, config, &options.model.to_string_lossy(), arena)?;
            check_adapter(output, arena)?;
            Ok(Written::Adapter)
        }
        Trained::Everything(_) => {
            let staged = pmetal_core::StagedDir::new(output)?;
            save_pretrained(model, &base.config, dtype, staged.path(), MAX_SHARD_BYTES)?;
            if let Some(tokenizer) = tokenizer {
                tokenizer.save(staged.path())?;
            }
            copy_generation_config(&options.model, staged.path())?;
            staged.commit()?;
            check_model(output, model, dtype, row)?;
            Ok(Written::Model)
        }
    }
}

fn copy_generation_config(model: &Path, folder: &Path) -> Result<()> {
    let (from, to) = (model.join(GENERATION_CONFIG), folder.join(GENERATION_CONFIG));
    if from.is_file() {
        fs::copy(&from, &to).map_err(pmetal_core::Error::io("write", &to))?;
    }
    Ok(())
}

/// Reads the adapter back and compares every number.
fn check_adapter(output: &Path, arena: &Arena) -> Result<()> {
    let file = AdapterFile::open(output)?;
    for param in arena.params() {
        let same = match file.tensors.get(param.name()) {
            Some(read) => bits(read)? == bits(param.master())?,
            None => false,
        };
        if !same {
            return Err(Error::ReadBack { path: file.path, reason: format!("{} differs", param.name()) });
        }
    }
    Ok(())
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// Reads the model back and compares its hidden states on one row.
fn check_model(output: &Path, model: &dyn CausalLMModel, dtype: DType, row: &Example) -> Result<()> {
    let again = load(&Checkpoint::open(output)?, dtype, &model.device(), None)?;
    let ids = &row.input_ids[..row.input_ids.len().min(64)];
    let run = |m: &dyn CausalLMModel| -> Result<Vec<u32>> {
        let hidden = no_grad(|| m.forward(&Input::rows(ids, &[ids.len()]), None))?;
        bits(&hidden.tensor().to_dtype(DType::F32)?)
    };
    if run(model)? != run(again.as_ref())? {
        let reason = "its hidden states differ from those of the trained model".into();
        return Err(Error::ReadBack { path: output.to_path_buf(), reason });
    }
    Ok(())
}
