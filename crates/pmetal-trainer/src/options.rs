//! Everything that can be said about a fine-tuning run, in one place: flags, defaults, and what of them does not go together.

use std::path::PathBuf;

use clap::{Args, Command, FromArgMatches, ValueEnum};
use pmetal_core::{DTypeChoice, DeviceChoice};
use pmetal_lora::{LoraConfig, ModulesToSave, TargetModules};

use crate::{DataOptions, Error, Result, SchedulerType, parse_bytes};

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FineTuneType {
    /// A low-rank adapter beside frozen weights.
    #[default]
    Lora,
    /// Every weight.
    Full,
}

/// Options of supervised fine-tuning.
#[derive(Clone, Debug, Args)]
pub struct SftOptions {
    /// Model to start from: a Hugging Face folder, a GGUF file, or an id of the hub (org/name, org/name:FILE.gguf)
    #[arg(long, visible_alias = "model-name-or-path", value_name = "PATH|ID", help_heading = "Input")]
    pub model: PathBuf,
    /// Branch, tag or commit of --model on the hub
    #[arg(long, value_name = "REVISION", help_heading = "Input")]
    pub revision: Option<String>,
    /// Scaling of rope in place of the model's own: yarn:4, linear:2, dynamic:2, none, or a JSON object
    #[arg(long, value_name = "KIND:FACTOR", help_heading = "Input")]
    pub rope_scaling: Option<String>,
    /// The rows.
    #[command(flatten)]
    pub data: DataOptions,
    /// Rows to evaluate on before and after training; without it, the valid files of a --dataset that is a folder
    #[arg(long, value_name = "PATH|ID", conflicts_with = "eval_split", help_heading = "Input")]
    pub eval_dataset: Option<PathBuf>,
    /// Share of the dataset held back for evaluation, or a number of rows
    #[arg(long, value_name = "SHARE", help_heading = "Input")]
    pub eval_split: Option<f64>,
    /// Special tokens to add to the vocabulary: a list with commas, or a file with one a line or a JSON list. Their rows start as
    /// the mean of all others
    #[arg(long, value_name = "TOKENS|FILE", help_heading = "Input")]
    pub add_tokens: Option<String>,
    /// The same for tokens that are text: printed where the model writes them
    #[arg(long, value_name = "TOKENS|FILE", help_heading = "Input")]
    pub add_plain_tokens: Option<String>,
    /// With new tokens, the embedding gets a multiple of this many rows
    #[arg(long, value_name = "ROWS", help_heading = "Input")]
    pub pad_to_multiple_of: Option<usize>,
    /// Fill packs of --max-seq-len tokens with whole rows; rows do not see each other
    #[arg(long, visible_alias = "packing", help_heading = "Input")]
    pub use_sequence_packing: bool,
    /// Keep the rows in file order
    #[arg(long, help_heading = "Input")]
    pub no_shuffle: bool,
    /// Folder for the adapter or model, and metrics.jsonl
    #[arg(long, visible_alias = "output-dir", default_value = "./output", value_name = "DIR", help_heading = "Output")]
    pub output: PathBuf,
    /// Evaluate every so many steps, besides before and after; 0 for never in between
    #[arg(long, default_value_t = 0, value_name = "STEPS", help_heading = "Output")]
    pub eval_steps: usize,
    /// Print a line every so many steps where there is no terminal
    #[arg(long, default_value_t = 10, value_name = "STEPS", help_heading = "Output")]
    pub logging_steps: usize,
    /// Train an adapter, or every weight
    #[arg(long, value_enum, default_value_t, help_heading = "Adapter")]
    pub fine_tune_type: FineTuneType,
    /// Rank of the adapter
    #[arg(long, visible_alias = "rank", value_name = "R", help_heading = "Adapter")]
    pub lora_r: Option<usize>,
    /// Numerator of the adapter's scale; twice the rank unless said
    #[arg(long, value_name = "ALPHA", help_heading = "Adapter")]
    pub lora_alpha: Option<f64>,
    /// Share of the adapter's input zeroed in training
    #[arg(long, value_name = "SHARE", help_heading = "Adapter")]
    pub lora_dropout: Option<f64>,
    /// Layers that get an adapter: names with commas between, or all-linear
    #[arg(long, value_name = "NAMES", help_heading = "Adapter")]
    pub lora_target_modules: Option<TargetModules>,
    /// Train these in full beside the adapter, and save them with it: embed_tokens, lm_head, or both with a comma between
    #[arg(long, value_name = "NAMES", help_heading = "Adapter")]
    pub modules_to_save: Option<ModulesToSave>,
    /// Scale by alpha / sqrt(rank)
    #[arg(long, help_heading = "Adapter")]
    pub use_rslora: bool,
    /// Start from this adapter (a path, or an id of the hub), with its rank, alpha and layers
    #[arg(long, visible_alias = "adapter", value_name = "PATH|ID", help_heading = "Adapter",
          conflicts_with_all = ["lora_r", "lora_alpha", "lora_target_modules", "use_rslora"])]
    pub lora: Option<PathBuf>,
    /// Start from random weights: --model needs config.json and a tokenizer only. With --fine-tune-type full
    #[arg(long, help_heading = "Adapter")]
    pub from_scratch: bool,
    /// Rows (or packs) that go through the model together
    #[arg(
        long,
        visible_alias = "per-device-train-batch-size",
        default_value_t = 4,
        value_name = "ROWS",
        help_heading = "Training"
    )]
    pub batch_size: usize,
    /// Batches of one optimizer step; the loss is the mean over the supervised tokens of all of them
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Training")]
    pub gradient_accumulation_steps: usize,
    /// Passes over the data
    #[arg(
        long,
        visible_alias = "num-train-epochs",
        default_value_t = 1.0,
        value_name = "N",
        help_heading = "Training"
    )]
    pub epochs: f64,
    /// Steps to take, whatever --epochs says; 0 leaves it to the epochs
    #[arg(long, visible_alias = "iters", default_value_t = 0, value_name = "STEPS", help_heading = "Training")]
    pub max_steps: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-4, value_name = "LR", help_heading = "Training")]
    pub learning_rate: f64,
    /// How the learning rate moves after warm-up
    #[arg(long, value_enum, default_value_t, help_heading = "Training")]
    pub lr_scheduler_type: SchedulerType,
    /// Steps in which the learning rate rises from zero
    #[arg(long, default_value_t = 0, value_name = "STEPS", conflicts_with = "warmup_ratio", help_heading = "Training")]
    pub warmup_steps: usize,
    /// The same as a share of all steps
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", help_heading = "Training")]
    pub warmup_ratio: f64,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.0, value_name = "DECAY", help_heading = "Training")]
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0 leaves them
    #[arg(long, default_value_t = 1.0, value_name = "NORM", help_heading = "Training")]
    pub max_grad_norm: f64,
    /// Run layers again in backward instead of keeping what they computed: the least memory, a quarter more time. Without it, that is done
    /// where memory asks for it
    #[arg(long, visible_alias = "grad-checkpoint", help_heading = "Training")]
    pub gradient_checkpointing: bool,
    /// Take at most so much of the device's memory, as in 17.8GiB: as much runs again in backward as that asks for
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Machine")]
    pub memory_limit: Option<u64>,
    /// Show what would be trained on what, in how many steps and how much memory, and stop there
    #[arg(long, help_heading = "Training")]
    pub dry_run: bool,
    /// Seed of the shuffle, the adapter's start and the dropout
    #[arg(long, default_value_t = 42, help_heading = "Training")]
    pub seed: u64,
    /// Dtype of activations: auto (the checkpoint's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE", help_heading = "Machine")]
    pub dtype: DTypeChoice,
    /// Device: auto, cpu, cuda, cuda:1 and so on, metal
    #[arg(long, default_value_t, value_name = "DEVICE", help_heading = "Machine")]
    pub device: DeviceChoice,
    /// The same bits in every run on a GPU too, as on a CPU; somewhat slower
    #[arg(long, help_heading = "Machine")]
    pub deterministic: bool,
}

impl SftOptions {
    /// The defaults, for a model and a file of rows.
    pub fn new(model: impl Into<PathBuf>, dataset: impl Into<PathBuf>) -> Result<Self> {
        let command = Self::augment_args(Command::new("sft").no_binary_name(true));
        let (model, dataset): (PathBuf, PathBuf) = (model.into(), dataset.into());
        let flags = ["--model".into(), model.into_os_string(), "--dataset".into(), dataset.into_os_string()];
        let read = command.try_get_matches_from(flags).and_then(|matches| Self::from_arg_matches(&matches));
        read.map_err(|e| Error::Option { option: "--model", reason: e.to_string() })
    }

    /// The adapter's settings; what is not said has its default.
    pub fn lora_config(&self) -> LoraConfig {
        let default = LoraConfig::default();
        let r = self.lora_r.unwrap_or(default.r);
        LoraConfig {
            r,
            lora_alpha: self.lora_alpha.unwrap_or(2.0 * r as f64),
            lora_dropout: self.lora_dropout.unwrap_or(default.lora_dropout),
            target_modules: self.lora_target_modules.clone().unwrap_or_default(),
            use_rslora: self.use_rslora,
            modules_to_save: self.modules_to_save.unwrap_or_default(),
            ..default
        }
    }

    /// Refuses values outside their range and options that do not go together.
    pub fn validate(&self) -> Result<()> {
        let refuse = |option, reason: &str| Err(Error::Option { option, reason: reason.into() });
        let finite = |x: f64| x.is_finite() && x >= 0.0;
        self.data.validate()?;
        if self.batch_size == 0 {
            return refuse("--batch-size", "must be at least 1");
        }
        if self.gradient_accumulation_steps == 0 {
            return refuse("--gradient-accumulation-steps", "must be at least 1");
        }
        if !finite(self.epochs) || (self.epochs == 0.0 && self.max_steps == 0) {
            return refuse("--epochs", "must be a positive number");
        }
        if !finite(self.learning_rate) {
            return refuse("--learning-rate", "must be a number of at least 0");
        }
        if !finite(self.weight_decay) {
            return refuse("--weight-decay", "must be a number of at least 0");
        }
        if !finite(self.max_grad_norm) {
            return refuse("--max-grad-norm", "must be a number of at least 0");
        }
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            return refuse("--warmup-ratio", "must lie between 0 and 1");
        }
        if self.use_sequence_packing && self.data.max_seq_len == 0 {
            return refuse("--use-sequence-packing", "needs the length of a pack: add --max-seq-len 2048");
        }
        if self.fine_tune_type == FineTuneType::Full && self.modules_to_save.is_some() {
            return refuse("--modules-to-save", "belongs to an adapter; --fine-tune-type full trains every weight");
        }
        if self.fine_tune_type == FineTuneType::Full && self.has_adapter_options() {
            return refuse("--fine-tune-type full", "trains every weight, leave out the --lora options");
        }
        if self.pad_to_multiple_of == Some(0) {
            return refuse("--pad-to-multiple-of", "must be at least 1");
        }
        if self.pad_to_multiple_of.is_some() && self.add_tokens.is_none() && self.add_plain_tokens.is_none() {
            return refuse("--pad-to-multiple-of", "pads the vocabulary that new tokens change: add --add-tokens");
        }
        if self.from_scratch && self.fine_tune_type != FineTuneType::Full {
            return refuse("--from-scratch", "needs every weight trained: add --fine-tune-type full");
        }
        Ok(())
    }

    fn has_adapter_options(&self) -> bool {
        let given = [self.lora_r.is_some(), self.lora_alpha.is_some(), self.lora_dropout.is_some(), self.use_rslora];
        given.contains(&true) || self.lora.is_some() || self.lora_target_modules.is_some()
    }
}
