//! Supervised fine-tuning from paths to paths: read the rows and the model, train, evaluate, write, read back.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use candle_core::{DType, Device, Tensor};
use pmetal_data::{Dataset, DatasetOptions, Example, Sampler, Template, Tokenizer, pack, split};
use pmetal_hub::{DownloadProgress, Kind, locate};
use pmetal_lora::{AdapterFile, LoraConfig, Use, attach, attach_file};
use pmetal_models::{
    CausalLMModel, Checkpoint, DecoderSpec, Input, dtype_of, load, random, read_config, save_pretrained, spec_of,
    tensors_of,
};
use pmetal_ops::{Arena, Policy, no_grad};

use crate::{
    Error, FineTuneType, LoopSettings, MetricsFile, Observer, Result, Schedule, SftOptions, StepSettings, Summary,
    TrainingData, train,
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
    let inputs = Inputs::locate(options, observer.downloads())?;
    let base = Base::open(options, &inputs.model)?;
    let tokenizer = Tokenizer::find(&inputs.model)?;
    let (dataset, eval_rows) = read_rows(options, &base, tokenizer.as_ref(), observer)?;
    let batches = Batches::new(options, &dataset.examples, observer);
    make_output(&options.output)?;

    let dtype = options.dtype.resolve(base.stored_dtype);
    let (model, trained) = prepare(options, &inputs, &base, dtype, &options.device.resolve())?;
    let arena = trained.arena();
    let total: usize = model.named_weights().iter().map(|(_, w)| w.shape().elem_count()).sum();
    observer.note(&format!("training {} parameters of a model of {total} in {}", arena.len(), dtype.as_str()));

    // not before all else is known to be right: a run that cannot start leaves the metrics of the last one alone
    let mut metrics = MetricsFile::create(&options.output.join("metrics.jsonl"))?;
    let epoch = |epoch| batches.epoch(epoch);
    let data = TrainingData { rows: &dataset.examples, eval_rows: &eval_rows, epoch: &epoch };
    let summary = train(model.as_ref(), arena, &data, &loop_settings(options), &mut metrics, observer, stop)?;
    let written = write(options, &base, tokenizer.as_ref(), model.as_ref(), &trained, dtype, &dataset)?;
    Ok(Outcome { summary, written })
}

fn make_output(folder: &Path) -> Result<()> {
    if folder.is_file() {
        return Err(Error::OutputIsFile { path: folder.to_path_buf() });
    }
    Ok(fs::create_dir_all(folder).map_err(pmetal_core::Error::io("create", folder))?)
}

/// Where on this machine lies what the options name by path or id.
struct Inputs {
    model: PathBuf,
    lora: Option<PathBuf>,
}

impl Inputs {
    fn locate(options: &SftOptions, progress: &dyn DownloadProgress) -> Result<Self> {
        let model = locate(Kind::Model, &options.model, options.revision.as_deref(), progress)?;
        let lora = options.lora.as_ref().map(|lora| locate(Kind::Model, lora, None, progress)).transpose()?;
        Ok(Self { model, lora })
    }
}

/// Where a run starts: a checkpoint, or a configuration alone.
struct Base {
    path: PathBuf,
    config: serde_json::Value,
    spec: DecoderSpec,
    stored_dtype: DType,
    checkpoint: Option<Checkpoint>,
}

impl Base {
    fn open(options: &SftOptions, model: &Path) -> Result<Self> {
        let path = model.to_path_buf();
        if options.from_scratch {
            let config = read_config(model)?;
            let stored_dtype = dtype_of(&config).unwrap_or(DType::BF16);
            return Ok(Self { path, spec: spec_of(&config)?, config, stored_dtype, checkpoint: None });
        }
        let checkpoint = Checkpoint::open(model)?;
        let (config, stored_dtype) = (checkpoint.config().clone(), checkpoint.stored_dtype());
        Ok(Self { path, config, spec: checkpoint.spec().clone(), stored_dtype, checkpoint: Some(checkpoint) })
    }
}

/// Training and evaluation rows, tokenized.
fn read_rows(
    options: &SftOptions,
    base: &Base,
    tokenizer: Option<&Tokenizer>,
    observer: &mut dyn Observer,
) -> Result<(Dataset, Vec<Example>)> {
    let dataset_options = DatasetOptions {
        train_on: options.train_on,
        template: Template::choose(&options.chat_template, tokenizer)?,
        max_seq_len: options.max_seq_len,
        vocab_size: base.spec.vocab_size,
    };
    let mut dataset = Dataset::load(&options.dataset, tokenizer, &dataset_options)?;
    let mut eval_rows = Vec::new();
    if let Some(path) = &options.eval_dataset {
        eval_rows = Dataset::load(path, tokenizer, &dataset_options)?.examples;
    } else if let Some(share) = options.eval_split {
        (dataset.examples, eval_rows) = hold_back(dataset.examples, share, options.seed)?;
    }
    observer.note(&dataset.report.to_string());
    if !eval_rows.is_empty() {
        observer.note(&format!("{} rows to evaluate on", eval_rows.len()));
    }
    Ok((dataset, eval_rows))
}

/// Holds back a share of the rows (below 1) or a number of them (whole).
fn hold_back(rows: Vec<Example>, share: f64, seed: u64) -> Result<(Vec<Example>, Vec<Example>)> {
    let n = rows.len();
    if share > 1.0 && share.fract() != 0.0 {
        let reason = format!("{share} is neither a share of the rows, such as 0.1, nor a whole number of them");
        return Err(Error::Option { option: "--eval-split", reason });
    }
    let held = if share < 1.0 { (share * n as f64).round() } else { share };
    if !(held >= 1.0 && held < n as f64) {
        let reason = format!("{share} of {n} rows leaves nothing to train on or to evaluate on");
        return Err(Error::Option { option: "--eval-split", reason });
    }
    Ok(split(rows, held as usize, seed))
}

/// The micro-batches of each epoch: of rows, or of packs of rows.
struct Batches {
    sampler: Sampler,
    packs: Option<Vec<Vec<usize>>>,
}

impl Batches {
    fn new(options: &SftOptions, rows: &[Example], observer: &mut dyn Observer) -> Self {
        let mut lengths: Vec<usize> = rows.iter().map(|row| row.input_ids.len()).collect();
        let mut packs = None;
        if options.use_sequence_packing {
            let packing = pack(&lengths, options.max_seq_len);
            observer.note(&format!(
                "packing: {} rows in {} packs of {} tokens, {:.2} % filled (the last pack aside)",
                rows.len(),
                packing.packs.len(),
                options.max_seq_len,
                packing.efficiency * 100.0
            ));
            lengths = packing.packs.iter().map(|pack| pack.iter().map(|&row| lengths[row]).sum()).collect();
            packs = Some(packing.packs);
        }
        Self { sampler: Sampler::new(lengths, options.batch_size, options.seed, !options.no_shuffle), packs }
    }

    fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        let batches = self.sampler.epoch(epoch);
        match &self.packs {
            None => batches,
            Some(packs) => {
                batches.into_iter().map(|b| b.into_iter().flat_map(|p| packs[p].clone()).collect()).collect()
            }
        }
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
    inputs: &Inputs,
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
    let Some(path) = &inputs.lora else {
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
    dataset: &Dataset,
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
            copy_generation_config(&base.path, staged.path())?;
            staged.commit()?;
            check_model(output, model, dtype, &dataset.examples[0])?;
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
