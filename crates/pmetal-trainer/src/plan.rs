//! What a run would do: parameters, rows, steps and memory, before any of it is done.

use std::{collections::BTreeMap, fmt, sync::atomic::AtomicBool};

use candle_core::{DType, Device, Shape};
use pmetal_core::total_memory;
use pmetal_lora::{LoraConfig, adapter_tensors};
use pmetal_models::{EMBEDDING, HEAD, parameters_of};
use serde::Serialize;

use crate::{
    Epochs, FineTuneType, MemoryChoice, Observer, Result, SftOptions, StepSize,
    memory::gib,
    sft::{Setup, loop_settings},
};

/// Bytes of an f32: a trained value and its gradient each take one, AdamW's moments two.
const F32_BYTES: u64 = 4;
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
    /// Trained values, and copies of them in the dtype of products.
    pub trained: u64,
    /// Gradients of them.
    pub gradients: u64,
    /// Optimizer states of them.
    pub optimizer: u64,
    /// What is kept of the forward pass, and the room of the backward pass.
    pub activations: u64,
    /// Logits of a block of tokens.
    pub logits: u64,
}

impl Memory {
    /// The same with `numbers` trained values, which have copies in `dtype` where products of the device read them so.
    pub(crate) fn with_trained(self, numbers: u64, full: bool, dtype: DType, device: &Device) -> Self {
        let copied = (full || !device.is_cpu()) && dtype != DType::F32;
        let copy = if copied { dtype.size_in_bytes() as u64 } else { 0 };
        Self {
            trained: numbers * (F32_BYTES + copy),
            gradients: numbers * F32_BYTES,
            optimizer: numbers * 2 * F32_BYTES,
            ..self
        }
    }

    /// The same with what a step of `size` takes beside it, and how: see [`choose_memory`].
    pub(crate) fn with_step(
        self,
        options: &SftOptions,
        size: &StepSize,
        device: &Device,
        machine_memory: Option<u64>,
    ) -> Result<(Self, MemoryChoice)> {
        let vocab = size.spec.vocab_size as u64;
        let choose = |logits| choose_memory(options, size, device, self.fixed() + logits, machine_memory);
        if device.is_cpu() {
            // f32, and once more in the dtype of the products
            let row = F32_BYTES * vocab;
            let block = LOGITS_BYTES.max(8 * row).min(size.tokens * row);
            let logits = block * (F32_BYTES + size.width) / F32_BYTES;
            let choice = choose(logits)?;
            return Ok((Self { activations: choice.bytes_without_logits, logits, ..self }, choice));
        }
        let choice = choose(0)?;
        let logits = choice.logits_bytes.min(size.tokens * vocab * size.width);
        let activations = choice.bytes.saturating_sub(logits);
        Ok((Self { activations, logits, ..self }, choice))
    }

    /// Weights and optimizer.
    pub(crate) fn fixed(&self) -> u64 {
        self.mapped_weights + self.weights + self.trained + self.gradients + self.optimizer
    }

    /// The parts by name, in the order in which they are shown.
    pub(crate) fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("weights, mapped", self.mapped_weights),
            ("weights", self.weights),
            ("trained", self.trained),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("logits", self.logits),
        ]
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
        let parameters = count(&parameters_of(spec)?);
        let (mapped_weights, weights) = match &setup.base.checkpoint {
            Some(checkpoint) if !full && on_cpu => checkpoint.weight_bytes(setup.dtype)?,
            Some(_) if !full => (0, parameters * width),
            _ => (0, 0),
        };
        let machine_memory = machine_memory(&setup.device)?;
        let fixed = Memory { mapped_weights, weights, ..Memory::default() };
        let fixed = fixed.with_trained(numbers, full, setup.dtype, &setup.device);
        let (memory, choice) = fixed.with_step(options, &step_size(options, setup), &setup.device, machine_memory)?;
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
            memory,
            choice,
            checkpointing: choice.line(spec.num_hidden_layers(), memory.fixed()),
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
        (needed > usable(machine)).then(|| {
            format!(
                "this run needs about {} of memory, the machine has {}: lower --batch-size or --max-seq-len",
                gib(needed),
                gib(machine)
            )
        })
    }
}

/// Bytes of the GPU's memory, or of this machine's.
pub(crate) fn machine_memory(device: &Device) -> Result<Option<u64>> {
    Ok(pmetal_ops::device::memory(device)?.map(|memory| memory.total).or_else(total_memory))
}

/// Numbers in tensors of these shapes.
pub(crate) fn count(tensors: &[(String, Shape)]) -> u64 {
    tensors.iter().map(|(_, shape)| shape.elem_count() as u64).sum()
}

/// The largest step of a run.
pub(crate) fn step_size<'a>(options: &SftOptions, setup: &'a Setup) -> StepSize<'a> {
    let full = options.fine_tune_type == FineTuneType::Full;
    let tokens = setup.batches.sampler.largest_batch_tokens();
    StepSize {
        spec: &setup.base.spec,
        width: setup.dtype.size_in_bytes() as u64,
        rank: if full { 0 } else { adapter_config(options, setup).r as u64 },
        tokens,
        longest: tokens / options.batch_size.max(1) as u64,
    }
}

/// What of a step runs again in backward, where `fixed` bytes are weights and optimizer: as much as --memory-limit or the machine asks for, or
/// all that saves memory where --gradient-checkpointing is said alone.
pub(crate) fn choose_memory(
    options: &SftOptions,
    size: &StepSize,
    device: &Device,
    fixed: u64,
    machine_memory: Option<u64>,
) -> Result<MemoryChoice> {
    let again = options.gradient_checkpointing;
    let machine = machine_memory.map(usable).filter(|_| !again);
    let limit = options.memory_limit.or(machine).map(|limit| limit.saturating_sub(fixed));
    let unforced = size.choose(limit, again, None);
    if unforced.checkpointing.is_none() {
        return Ok(unforced);
    }
    Ok(size.choose(limit, again, pmetal_ops::rates(device)?))
}

/// What of a machine's memory a run may take.
pub(crate) fn usable(bytes: u64) -> u64 {
    (bytes as f64 * (1.0 - RESERVED)) as u64
}

fn adapter_config(options: &SftOptions, setup: &Setup) -> LoraConfig {
    setup.base.adapter.as_ref().map_or_else(|| options.lora_config(), |file| file.config.clone())
}

/// The trained tensors and their sizes.
fn trained_tensors(options: &SftOptions, setup: &Setup) -> Result<Vec<(String, u64)>> {
    let spec = &setup.base.spec;
    let all: Vec<(String, u64)> =
        parameters_of(spec)?.into_iter().map(|(name, shape)| (name, shape.elem_count() as u64)).collect();
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
        line(f, "memory, about", gib(self.memory.total()))?;
        for (name, bytes) in self.memory.parts() {
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
