//! Supervised fine-tuning from paths to paths: read the rows and the model, train, evaluate, write, read back.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use candle_core::{DType, Device};
use pmetal_core::StagedDir;
use pmetal_data::{TOKENIZER_FILES, Template, TemplateChoice, Tokenizer};
use pmetal_hub::{DownloadProgress, Kind, locate};
use pmetal_lora::{AdapterFile, LoraConfig, ModulesToSave, Use, attach, attach_file};
use pmetal_models::{
    CausalLMModel, Checkpoint, DecoderSpec, dtype_of, load, override_rope_scaling, parameters_of, random, read_config,
    refuse_too_large, save_pretrained, spec_of, text_config, unused_dropout,
};
use pmetal_ops::{Arena, LOGITS_BYTES};

use crate::{
    Error, FineTuneType, LoopSettings, MetricsFile, Observer, Result, Schedule, SftOptions, StepSettings, Summary,
    TrainingData,
    plan::{Plan, choose_memory, step_size},
    read_back::{check_adapter, check_model},
    rows::{Batches, Rows},
    train,
    vocabulary::add_tokens,
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

/// All that a run knows before the model is loaded.
pub(crate) struct Setup {
    inputs: Inputs,
    pub(crate) base: Base,
    tokenizer: Option<Tokenizer>,
    pub(crate) rows: Rows,
    pub(crate) batches: Batches,
    /// Of activations.
    pub(crate) dtype: DType,
    pub(crate) device: Device,
}

impl Setup {
    /// Finds the model, opens its tokenizer, reads the rows, and says what will be trained on.
    pub(crate) fn new(options: &SftOptions, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Self> {
        options.validate()?;
        pmetal_ops::device::deterministic(options.deterministic);
        let device = pmetal_ops::device::open(options.device)?;
        let inputs = Inputs::locate(options, observer.downloads())?;
        let mut base = Base::open(options, &inputs)?;
        let mut tokenizer = Tokenizer::find_with_adapter(&inputs.model, inputs.lora.as_deref())?;
        add_tokens(options, &mut base, tokenizer.as_mut(), observer)?;
        let template = Template::choose(&options.data.chat_template, tokenizer.as_ref())?;
        if let Some(tokenizer) = &tokenizer {
            note_unknown_marks(options, &template, tokenizer, observer);
        }
        let rows = Rows::read(options, base.spec.vocab_size, tokenizer.as_ref(), &template, observer, stop)?;
        if let Some((tokenizer, source)) = tokenizer.as_mut().zip(template.used_for(&rows.report)) {
            tokenizer.set_chat_template(source);
        }
        let batches = Batches::new(options, &rows.train)?;
        describe(options, &rows, &batches, observer);
        let dtype = options.dtype.resolve(base.stored_dtype);
        Ok(Self { inputs, base, tokenizer, rows, batches, dtype, device })
    }
}

/// Runs supervised fine-tuning as `options` say. `stop` ends it after the step under way, and what was trained is written.
pub fn sft(options: &SftOptions, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Outcome> {
    let mut setup = Setup::new(options, observer, stop)?;
    let plan = Plan::of(options, &setup)?;
    if let Some(warning) = plan.warning() {
        observer.note(&warning);
    }
    make_output(&options.output)?;
    let (model, trained) = prepare(options, &mut setup.base, setup.dtype, &setup.device)?;
    let arena = trained.arena();
    let total: usize = model.named_weights().iter().map(|(_, w)| w.shape().elem_count()).sum();
    let dtype = setup.dtype.as_str();
    let device = pmetal_ops::device::name(&setup.device);
    for (key, p) in unused_dropout(&setup.base.config) {
        observer.note(&format!(
            "{key} is {p} in config.json; dropout of the model itself is not applied, see --lora-dropout"
        ));
    }
    observer.note(&format!("training {} parameters of a model of {total} in {dtype} on {device}", arena.len()));

    let settings = within_memory(options, &setup, &plan, observer)?;

    // not before all else is known to be right: a run that cannot start leaves the metrics of the last one alone
    let mut metrics = MetricsFile::create(&options.output.join("metrics.jsonl"))?;
    let data = TrainingData { rows: &setup.rows.train, eval_rows: &setup.rows.eval, order: &setup.batches };
    let summary = train(model.as_ref(), arena, &data, &settings, &mut metrics, observer, stop)?;
    let written = write(options, &setup, model.as_ref(), &trained)?;
    Ok(Outcome { summary, written })
}

/// A template of another family is read token by token of this one: it can be learnt, but ends of turns are no single tokens.
fn note_unknown_marks(options: &SftOptions, template: &Template, tokenizer: &Tokenizer, observer: &mut dyn Observer) {
    let unknown = template.unknown_marks(tokenizer);
    if !unknown.is_empty() && options.data.chat_template != TemplateChoice::Auto {
        observer.note(&format!(
            "the chat template's {} are no tokens of this model, only text: --add-tokens adds them, --chat-template auto takes the model's own",
            unknown.join(", ")
        ));
    }
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

/// Where on this machine lies what the options name by path or id.
pub(crate) struct Inputs {
    pub(crate) model: PathBuf,
    lora: Option<PathBuf>,
}

impl Inputs {
    pub(crate) fn locate(options: &SftOptions, progress: &dyn DownloadProgress) -> Result<Self> {
        let model = locate(Kind::Model, &options.model, options.revision.as_deref(), progress)?;
        let lora = options.lora.as_ref().map(|lora| locate(Kind::Model, lora, None, progress)).transpose()?;
        Ok(Self { model, lora })
    }
}

/// Where a run starts: a checkpoint, or a configuration alone; and an adapter where one goes on.
pub(crate) struct Base {
    config: serde_json::Value,
    /// With the vocabulary that the run trains.
    pub(crate) spec: DecoderSpec,
    stored_dtype: DType,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) adapter: Option<AdapterFile>,
    /// Tables to train beside the adapter.
    pub(crate) modules_to_save: ModulesToSave,
}

impl Base {
    fn open(options: &SftOptions, inputs: &Inputs) -> Result<Self> {
        if options.from_scratch {
            let mut config = text_config(&read_config(&inputs.model)?)?.into_owned();
            if let Some(scaling) = &options.rope_scaling {
                override_rope_scaling(&mut config, scaling)?;
            }
            let stored_dtype = dtype_of(&config).unwrap_or(DType::BF16);
            let (spec, modules_to_save) = (spec_of(&config)?, ModulesToSave::default());
            return Ok(Self { spec, config, stored_dtype, checkpoint: None, adapter: None, modules_to_save });
        }
        let mut checkpoint = Checkpoint::open(&inputs.model)?;
        if let Some(scaling) = &options.rope_scaling {
            checkpoint.override_rope_scaling(scaling)?;
        }
        let (config, mut spec) = (checkpoint.config().clone(), checkpoint.spec().clone());
        let adapter = inputs.lora.as_deref().map(AdapterFile::open).transpose()?;
        if let Some(rows) = adapter.as_ref().and_then(AdapterFile::vocab_rows) {
            spec.vocab_size = rows;
        }
        let modules_to_save = options.modules_to_save.unwrap_or_default();
        let stored_dtype = checkpoint.stored_dtype();
        Ok(Self { config, spec, stored_dtype, checkpoint: Some(checkpoint), adapter, modules_to_save })
    }

    /// Gives the model, and the tables of the adapter, `rows` ids; the rows of `fresh` start anew.
    pub(crate) fn resize_vocabulary(&mut self, rows: usize, fresh: &[u32]) -> Result<()> {
        self.spec.vocab_size = rows;
        self.config["vocab_size"] = rows.into();
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.resize_vocabulary(rows, fresh);
        }
        match &mut self.adapter {
            Some(adapter) => Ok(adapter.resize_vocabulary(rows, fresh)?),
            None => Ok(()),
        }
    }
}

pub(crate) fn loop_settings(options: &SftOptions) -> LoopSettings {
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
            checkpointing: None,
            logits_bytes: LOGITS_BYTES,
            seed: options.seed,
        },
    }
}

/// The settings with what runs again in backward, now that the model's memory is taken; says so.
fn within_memory(
    options: &SftOptions,
    setup: &Setup,
    plan: &Plan,
    observer: &mut dyn Observer,
) -> Result<LoopSettings> {
    pmetal_ops::device::synchronize(&setup.device)?;
    let (choice, fixed) = match pmetal_ops::device::memory(&setup.device)? {
        Some(memory) => {
            let size = step_size(options, setup);
            (choose_memory(options, &size, &setup.device, memory.live, Some(memory.total))?, memory.live)
        }
        None => (plan.choice, plan.memory.fixed()),
    };
    if let Some(line) = choice.line(setup.base.spec.num_hidden_layers(), fixed) {
        observer.note(&line);
    }
    let mut settings = loop_settings(options);
    settings.step.checkpointing = choice.checkpointing;
    settings.step.logits_bytes = choice.logits_bytes as usize;
    Ok(settings)
}

/// The model with its adapter, or with every weight in an arena.
fn prepare(
    options: &SftOptions,
    base: &mut Base,
    dtype: DType,
    device: &Device,
) -> Result<(Box<dyn CausalLMModel>, Trained)> {
    let Some(checkpoint) = &base.checkpoint else {
        refuse_too_large(&base.spec, dtype)?;
        let arena = Arena::new(&parameters_of(&base.spec)?, dtype, device)?;
        let model = random(&base.config, dtype, device, options.seed, Some(&arena))?;
        return Ok((model, Trained::Everything(arena)));
    };
    if options.fine_tune_type == FineTuneType::Full {
        let arena = Arena::new(&parameters_of(checkpoint.spec())?, dtype, device)?;
        return Ok((load(checkpoint, dtype, device, Some(&arena))?, Trained::Everything(arena)));
    }
    let mut model = load(checkpoint, dtype, device, None)?;
    let Some(file) = &mut base.adapter else {
        let config = LoraConfig { modules_to_save: base.modules_to_save, ..options.lora_config() };
        let arena = attach(model.as_mut(), &config, options.seed)?;
        return Ok((model, Trained::Adapter(arena, config)));
    };
    file.config.modules_to_save = file.config.modules_to_save.and(base.modules_to_save);
    if let Some(dropout) = options.lora_dropout {
        file.config.lora_dropout = dropout;
        file.config.validate()?;
    }
    let arena = attach_file(model.as_mut(), file, Use::Training)?;
    let arena = arena.ok_or_else(|| Error::NoSteps { reason: format!("{} has no tensors", file.path.display()) })?;
    Ok((model, Trained::Adapter(arena, file.config.clone())))
}

fn write(options: &SftOptions, setup: &Setup, model: &dyn CausalLMModel, trained: &Trained) -> Result<Written> {
    let Setup { inputs, base, tokenizer, dtype, .. } = setup;
    let output = &options.output;
    let staged = StagedDir::new(output)?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(staged.path())?;
    }
    match trained {
        Trained::Adapter(arena, config) => {
            let text_module = base.checkpoint.as_ref().and_then(Checkpoint::text_module);
            let on = pmetal_lora::Base { name: &options.model.to_string_lossy(), spec: model.spec(), text_module };
            pmetal_lora::save(staged.path(), config, on, arena)?;
            commit(staged, output)?;
            check_adapter(output, model.spec(), arena)?;
            Ok(Written::Adapter)
        }
        Trained::Everything(_) => {
            save_pretrained(model, &base.config, *dtype, staged.path(), MAX_SHARD_BYTES)?;
            copy_generation_config(&inputs.model, staged.path())?;
            commit(staged, output)?;
            check_model(output, model, *dtype)?;
            Ok(Written::Model)
        }
    }
}

/// Puts what is staged in the output folder. The tokenizer and the template of an earlier run there do not belong to this one.
fn commit(staged: StagedDir, output: &Path) -> Result<()> {
    let stale: Vec<_> = TOKENIZER_FILES.iter().filter(|name| !staged.path().join(name).exists()).collect();
    staged.commit()?;
    for path in stale.into_iter().map(|name| output.join(name)).filter(|path| path.is_file()) {
        fs::remove_file(&path).map_err(pmetal_core::Error::io("remove", &path))?;
    }
    Ok(())
}

fn copy_generation_config(model: &Path, folder: &Path) -> Result<()> {
    let (from, to) = (model.join(GENERATION_CONFIG), folder.join(GENERATION_CONFIG));
    if from.is_file() {
        fs::copy(&from, &to).map_err(pmetal_core::Error::io("write", &to))?;
    }
    Ok(())
}
