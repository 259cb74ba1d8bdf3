//! What a run would do: parameters, rows, steps and memory, before any of it is done.

use std::{collections::BTreeMap, fmt, sync::atomic::AtomicBool};

use candle_core::DType;
use pmetal_core::total_memory;
use pmetal_lora::{LoraConfig, adapter_tensors};
use pmetal_models::{EMBEDDING, HEAD, tensors_of};
use serde::Serialize;

use crate::{
    Epochs, FineTuneType, MemoryChoice, Observer, Result, SftOptions, StepSize,
    memory::gib,
    sft::{Setup, loop_settings},
};

/// Bytes of a trained value: itself, its gradient and AdamW's two moments, all f32.
const TRAINED_BYTES: u64 = 16;
/// Bytes of the block of logits that the loss is computed on, on the CPU.
const LOGITS_BYTES: u64 = 64 << 20;
/// The share of the machine's memory that others need.
const RESERVED: f64 = 0.1;

/// What a run would do.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The family.
    pub model_type: String,
    /// Layers of the model.
    pub layers: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// Dtype of activations.
    pub dtype: &'static str,
    /// Parameters trained, by the module they belong to (`q_proj`, `embed_tokens`).
    pub trained: BTreeMap<String, u64>,
    /// Layers that have a trained parameter.
    pub trained_layers: usize,
    /// Rows to train on.
    pub rows: usize,
    /// Rows to evaluate on.
    pub eval_rows: usize,
    /// Tokens of the rows to train on.
    pub tokens: u64,
    /// Packs of them, where they are packed.
    pub packs: Option<usize>,
    /// Steps of an epoch.
    pub steps_per_epoch: usize,
    /// Steps of the run.
    pub steps: usize,
    /// Tokens of the largest micro-batch of the first epoch.
    pub largest_batch_tokens: u64,
    /// Bytes, by part.
    pub memory: Memory,
    /// What runs again in backward.
    #[serde(skip)]
    pub choice: MemoryChoice,
    /// The same in words; none where nothing does.
    pub checkpointing: Option<String>,
    /// Bytes of --memory-limit.
    pub memory_limit: Option<u64>,
    /// Bytes of memory of the GPU, or of this machine; none where it does not say.
    pub machine_memory: Option<u64>,
}

/// Bytes that a run needs, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Frozen weights read where they lie in their files.
    pub mapped_weights: u64,
    /// Frozen weights in memory.
    pub weights: u64,
    /// Trained values, their gradients and optimizer states.
    pub trained: u64,
    /// What is kept of the forward pass, and the room of the backward pass.
    pub activations: u64,
    /// Logits of a block of tokens.
    pub logits: u64,
}

impl Memory {
    /// Weights and optimizer.
    pub(crate) fn fixed(&self) -> u64 {
        self.mapped_weights + self.weights + self.trained
    }

    /// All parts.
    pub fn total(&self) -> u64 {
        self.fixed() + self.activations + self.logits
    }
}

/// Plans a run: reads model headers and rows, loads no weight and trains nothing.
///
/// # Errors
/// As [`crate::sft`] before its first step.
pub fn plan(options: &SftOptions, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Plan> {
    Plan::of(options, &Setup::new(options, observer, stop)?)
}

impl Plan {
    pub(crate) fn of(options: &SftOptions, setup: &Setup) -> Result<Self> {
        let spec = &setup.base.spec;
        let trained = trained_tensors(options, setup)?;
        let largest = setup.batches.sampler.largest_batch_tokens();
        let (steps_per_epoch, steps) = loop_settings(options).steps(setup.batches.batches());
        let numbers: u64 = trained.iter().map(|(_, numbers)| numbers).sum();
        let full = options.fine_tune_type == FineTuneType::Full;
        let (on_cpu, width) = (setup.device.is_cpu(), setup.dtype.size_in_bytes() as u64);
        let copies = if (full || !on_cpu) && setup.dtype != DType::F32 { width } else { 0 };
        let parameters = tensors_of(spec)?.iter().map(|(_, shape)| shape.elem_count() as u64).sum();
        let (mapped_weights, weights) = match &setup.base.checkpoint {
            Some(checkpoint) if !full && on_cpu => checkpoint.weight_bytes(setup.dtype)?,
            Some(_) if !full => (0, parameters * width),
            _ => (0, 0),
        };
        let trained_bytes = numbers * (TRAINED_BYTES + copies);
        let machine_memory =
            pmetal_ops::device::memory(&setup.device)?.map(|memory| memory.total).or_else(total_memory);
        let fixed = mapped_weights + weights + trained_bytes;
        let choice = choose_memory(options, setup, fixed, machine_memory)?;
        let logits = if on_cpu {
            // f32, and once more in the dtype of the products
            let row = 4 * spec.vocab_size as u64;
            LOGITS_BYTES.max(8 * row).min(largest * row) * (4 + width) / 4
        } else {
            choice.logits_bytes.min(largest * spec.vocab_size as u64 * width)
        };
        let mut by_module = BTreeMap::new();
        for (name, numbers) in &trained {
            *by_module.entry(module_of(name)).or_insert(0) += numbers;
        }
        Ok(Self {
            model_type: spec.model_type.clone(),
            layers: spec.num_hidden_layers(),
            parameters,
            dtype: setup.dtype.as_str(),
            trained_layers: layers_of(&trained),
            trained: by_module,
            rows: setup.rows.train.len(),
            eval_rows: setup.rows.eval.len(),
            tokens: setup.batches.sampler.tokens(),
            packs: setup.batches.packing.as_ref().map(pmetal_data::Packing::len),
            steps_per_epoch,
            steps,
            largest_batch_tokens: largest,
            memory: Memory {
                mapped_weights,
                weights,
                trained: trained_bytes,
                activations: if on_cpu { choice.bytes_without_logits } else { choice.bytes.saturating_sub(logits) },
                logits,
            },
            choice,
            checkpointing: choice.line(spec.num_hidden_layers(), fixed),
            memory_limit: options.memory_limit,
            machine_memory,
        })
    }

    /// What to say where the machine has too little memory.
    pub fn warning(&self) -> Option<String> {
        let needed = self.memory.total();
        if let Some(limit) = self.memory_limit.filter(|_| !self.choice.fits) {
            let (needed, limit) = (gib(needed), gib(limit));
            return Some(format!(
                "this run needs about {needed} of memory, more than the {limit} of --memory-limit: lower --batch-size or --max-seq-len"
            ));
        }
        let machine = self.machine_memory?;
        (needed as f64 > machine as f64 * (1.0 - RESERVED)).then(|| {
            format!(
                "this run needs about {} of memory, the machine has {}: lower --batch-size or --max-seq-len",
                gib(needed),
                gib(machine)
            )
        })
    }
}

/// What of a step runs again in backward, where `fixed` bytes are weights and optimizer: as much as --memory-limit or the machine asks for, or
/// all that saves memory where --gradient-checkpointing is said alone.
pub(crate) fn choose_memory(
    options: &SftOptions,
    setup: &Setup,
    fixed: u64,
    machine_memory: Option<u64>,
) -> Result<MemoryChoice> {
    let full = options.fine_tune_type == FineTuneType::Full;
    let sampler = &setup.batches.sampler;
    let size = StepSize {
        spec: &setup.base.spec,
        width: setup.dtype.size_in_bytes() as u64,
        rank: if full { 0 } else { adapter_config(options, setup).r as u64 },
        tokens: sampler.largest_batch_tokens(),
        longest: sampler.largest_batch_tokens() / options.batch_size.max(1) as u64,
    };
    let usable = |bytes: u64| (bytes as f64 * (1.0 - RESERVED)) as u64;
    let again = options.gradient_checkpointing;
    let machine = machine_memory.map(usable).filter(|_| !again);
    let limit = options.memory_limit.or(machine).map(|limit| limit.saturating_sub(fixed));
    let unforced = size.choose(limit, again, None);
    if unforced.checkpointing.is_none() {
        return Ok(unforced);
    }
    Ok(size.choose(limit, again, pmetal_ops::rates(&setup.device)?))
}

fn adapter_config(options: &SftOptions, setup: &Setup) -> LoraConfig {
    setup.base.adapter.as_ref().map_or_else(|| options.lora_config(), |file| file.config.clone())
}

/// The trained tensors and their sizes.
fn trained_tensors(options: &SftOptions, setup: &Setup) -> Result<Vec<(String, u64)>> {
    let spec = &setup.base.spec;
    let all: Vec<(String, u64)> =
        tensors_of(spec)?.into_iter().map(|(name, shape)| (name, shape.elem_count() as u64)).collect();
    if options.fine_tune_type == FineTuneType::Full {
        return Ok(all);
    }
    let saved = setup.base.modules_to_save.and(adapter_config(options, setup).modules_to_save);
    let mut trained: Vec<(String, u64)> = match &setup.base.adapter {
        Some(file) => file.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.elem_count() as u64)).collect(),
        None => {
            let fresh = adapter_tensors(spec, &options.lora_config())?;
            fresh.into_iter().map(|(name, shape)| (name, shape.elem_count() as u64)).collect()
        }
    };
    let wanted = |name: &str| (name == EMBEDDING && saved.embed_tokens) || (name == HEAD && saved.lm_head);
    let tables = all.into_iter().filter(|(name, _)| wanted(name) && trained.iter().all(|(known, _)| known != name));
    let tables: Vec<_> = tables.collect();
    trained.extend(tables);
    Ok(trained)
}

/// `q_proj` of `model.layers.3.self_attn.q_proj.lora_A.weight`.
fn module_of(name: &str) -> String {
    let stem = [".weight", ".bias", ".lora_A", ".lora_B"]
        .iter()
        .fold(name, |name, end| name.strip_suffix(end).unwrap_or(name));
    stem.rsplit('.').next().unwrap_or(stem).to_string()
}

fn layers_of(trained: &[(String, u64)]) -> usize {
    let layer = |(name, _): &(String, u64)| name.split_once(".layers.")?.1.split('.').next()?.parse::<usize>().ok();
    let mut layers: Vec<usize> = trained.iter().filter_map(layer).collect();
    layers.sort_unstable();
    layers.dedup();
    layers.len()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.trained.values().sum();
        let share = 100.0 * total as f64 / self.parameters.max(1) as f64;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, text: String| writeln!(f, "{name:<22}{text}");
        line(
            f,
            "model",
            format!("{}, {} layers, {} parameters, {}", self.model_type, self.layers, self.parameters, self.dtype),
        )?;
        line(
            f,
            "trained",
            format!("{total} parameters ({share:.2} %) in {} of {} layers", self.trained_layers, self.layers),
        )?;
        for (module, numbers) in &self.trained {
            line(f, "", format!("{numbers:>14}  {module}"))?;
        }
        line(f, "rows", format!("{} to train on, {} to evaluate on", self.rows, self.eval_rows))?;
        let packs = self.packs.map(|packs| format!(", in {packs} packs")).unwrap_or_default();
        line(f, "tokens of an epoch", format!("{}{packs}", self.tokens))?;
        line(f, "steps", format!("{} ({} an epoch)", self.steps, self.steps_per_epoch))?;
        line(f, "largest micro-batch", format!("{} tokens", self.largest_batch_tokens))?;
        let m = &self.memory;
        line(f, "memory, about", gib(m.total()))?;
        for (name, bytes) in [
            ("weights, mapped", m.mapped_weights),
            ("weights", m.weights),
            ("trained, gradients, optimizer", m.trained),
            ("activations", m.activations),
            ("logits", m.logits),
        ] {
            line(f, "", format!("{:>14}  {name}", gib(bytes)))?;
        }
        if let Some(checkpointing) = &self.checkpointing {
            line(f, "checkpointing", checkpointing.clone())?;
        }
        match self.machine_memory {
            Some(machine) => line(f, "the device has", gib(machine)),
            None => Ok(()),
        }
    }
}
