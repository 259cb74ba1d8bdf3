//! What fine-tuning a model would take, from its `config.json` alone: no weight, no tokenizer and no row is read.

use std::{fmt, path::Path};

use candle_core::{DType, Device};
use pmetal_hub::{Kind, locate};
use pmetal_lora::adapter_tensors;
use pmetal_models::{
    Checkpoint, DecoderSpec, EMBEDDING, HEAD, MlpSpec, dtype_of, linear_layers, override_rope_scaling, parameters_of,
    read_config, spec_of,
};
use serde::Serialize;
use serde_json::Value;

use crate::{
    Error, Memory, Observer, Result, SftOptions, StepSize,
    memory::gib,
    plan::{count, machine_memory, usable},
};

/// Tokens of a row where nothing says how long rows are.
const ROW: usize = 2048;
/// The most tokens of a step that anybody means.
const MOST_TOKENS: usize = 1 << 27;
/// Bits of a number of 4-bit NormalFloat: its own, a scale of 8 bits for 64 of them, and an f32 for 256 scales (Dettmers et al., "QLoRA", 2023).
const NF4_BITS: f64 = 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0);

/// What fine-tuning a model would take.
#[derive(Clone, Debug, Serialize)]
pub struct Outline {
    /// The family.
    pub model_type: String,
    /// Layers of the model.
    pub layers: usize,
    /// Parameters of the model.
    pub parameters: u64,
    /// Those that a token meets, where the model has experts.
    pub active_parameters: Option<u64>,
    /// Dtype of activations and of frozen weights.
    pub dtype: &'static str,
    /// Rows of a step.
    pub batch_size: usize,
    /// Tokens of a row.
    pub max_seq_len: usize,
    /// The device.
    pub device: String,
    /// Bytes of memory of the GPU, or of this machine; none where it does not say.
    pub machine_memory: Option<u64>,
    /// Ways of training.
    pub methods: Vec<Method>,
}

/// A way of training.
#[derive(Clone, Debug, Serialize)]
pub struct Method {
    /// What it is called.
    pub name: &'static str,
    /// Whether `pmetal train` can do it.
    pub available: bool,
    /// Parameters trained.
    pub trained: u64,
    /// Bytes, by part.
    pub memory: Memory,
    /// Bytes of all parts.
    pub total: u64,
    /// Layers that run again in backward.
    pub layers_run_again: usize,
    /// Whether the device, or `--memory-limit`, has as much; none where it does not say.
    pub fits: Option<bool>,
}

/// Says what fine-tuning the model would take, where there is nothing more to tell: no rows are named, or there are no weights beside `config.json`.
/// Else none, and [`crate::plan`] says more.
///
/// # Errors
/// Where the configuration cannot be read or is of no family known, and where options do not go together.
pub fn outline(options: &SftOptions, observer: &mut dyn Observer) -> Result<Option<Outline>> {
    let path = locate(Kind::Model, &options.model, options.revision.as_deref(), observer.downloads())?;
    let alone = is_alone(&path) && !options.from_scratch;
    if !alone && !options.data.dataset.is_empty() {
        return Ok(None);
    }
    options.validate()?;
    if !options.data.dataset.is_empty() {
        observer.note("no weights beside config.json: no row is read, and rows are taken to be of the longest");
    }
    let mut config = config_of(&path)?;
    if let Some(scaling) = &options.rope_scaling {
        override_rope_scaling(&mut config, scaling)?;
    }
    Outline::of(options, &config, &pmetal_ops::device::open(options.device)?).map(Some)
}

/// Whether nothing but the configuration is there.
fn is_alone(path: &Path) -> bool {
    let is_weights = |name: &Path| name.extension().is_some_and(|end| end == "safetensors" || end == "gguf");
    match path.read_dir() {
        Ok(mut files) => !files.any(|file| file.is_ok_and(|file| is_weights(&file.path()))),
        Err(_) => path.extension().is_some_and(|end| end == "json"),
    }
}

fn config_of(path: &Path) -> Result<Value> {
    let is_gguf = path.is_file() && path.extension().is_none_or(|end| end != "json");
    let in_folder = path.is_dir() && !path.join("config.json").exists();
    Ok(if is_gguf || in_folder { Checkpoint::open(path)?.config().clone() } else { read_config(path)? })
}

impl Outline {
    fn of(options: &SftOptions, config: &Value, device: &Device) -> Result<Self> {
        let spec = spec_of(config)?;
        let dtype = options.dtype.resolve(dtype_of(config).unwrap_or(DType::BF16));
        let parameters = count(&parameters_of(&spec)?);
        let longest = match options.data.max_seq_len {
            0 => ROW.min(spec.max_position_embeddings.max(1)),
            longest => longest,
        };
        if longest.saturating_mul(options.batch_size) > MOST_TOKENS {
            let reason =
                format!("steps of {} rows of {longest} tokens are more than any machine takes", options.batch_size);
            return Err(Error::Option { option: "--max-seq-len", reason });
        }
        let machine_memory = machine_memory(device)?;
        let sized = Sized { options, spec: &spec, parameters, dtype, longest, device, machine_memory };
        Ok(Self {
            model_type: spec.model_type.clone(),
            layers: spec.num_hidden_layers(),
            parameters,
            active_parameters: spec.router().map(|_| parameters.saturating_sub(idle(&spec))),
            dtype: dtype.as_str(),
            batch_size: options.batch_size,
            max_seq_len: longest,
            device: pmetal_ops::device::name(device),
            machine_memory,
            methods: sized.methods()?,
        })
    }
}

/// Parameters of the experts that a token does not go to.
fn idle(spec: &DecoderSpec) -> u64 {
    let of_layer = |mlp: &MlpSpec| match mlp {
        MlpSpec::Gated(_) => 0,
        MlpSpec::Experts(experts) => {
            let (hidden, inner) = (spec.hidden_size as u64, experts.expert.intermediate_size as u64);
            let biases = if experts.expert.bias { 2 * inner + hidden } else { 0 };
            experts.router.experts.saturating_sub(experts.router.top_k) as u64 * (3 * hidden * inner + biases)
        }
    };
    spec.layers.iter().map(|layer| of_layer(&layer.mlp)).sum()
}

/// A model, a step and a machine.
struct Sized<'a> {
    options: &'a SftOptions,
    spec: &'a DecoderSpec,
    parameters: u64,
    dtype: DType,
    longest: usize,
    device: &'a Device,
    machine_memory: Option<u64>,
}

impl Sized<'_> {
    fn methods(&self) -> Result<Vec<Method>> {
        let width = self.dtype.size_in_bytes() as u64;
        let lora = self.options.lora_config();
        let saved = lora.modules_to_save;
        let table = (self.spec.vocab_size * self.spec.hidden_size) as u64;
        let is_trained = |name: &str| (name == EMBEDDING && saved.embed_tokens) || (name == HEAD && saved.lm_head);
        let tables = [EMBEDDING, HEAD].into_iter().filter(|name| is_trained(name)).count() as u64;
        let adapter = count(&adapter_tensors(self.spec, &lora)?) + tables * table;
        let weights = self.parameters * width;
        // on a CPU they are read where they lie in their files
        let frozen = match self.device.is_cpu() {
            true => Memory { mapped_weights: weights, ..Memory::default() },
            false => Memory { weights, ..Memory::default() },
        };
        let linear: u64 = linear_layers(self.spec)?.iter().map(|(_, [rows, columns])| (rows * columns) as u64).sum();
        let packed = (linear as f64 * NF4_BITS / 8.0).ceil() as u64 + self.parameters.saturating_sub(linear) * width;
        let packed = Memory { weights: packed, ..Memory::default() };
        let rank = lora.r as u64;
        Ok(vec![
            self.method("lora", frozen, adapter, rank)?,
            Method { available: false, ..self.method("qlora", packed, adapter, rank)? },
            self.method("full", Memory::default(), self.parameters, 0)?,
        ])
    }

    /// A way of training `trained` values beside frozen weights; an adapter's where it has a rank.
    fn method(&self, name: &'static str, frozen: Memory, trained: u64, rank: u64) -> Result<Method> {
        let longest = self.longest as u64;
        let size = StepSize {
            spec: self.spec,
            width: self.dtype.size_in_bytes() as u64,
            rank,
            tokens: longest * self.options.batch_size as u64,
            longest,
        };
        let fixed = frozen.with_trained(trained, rank == 0, self.dtype, self.device);
        let (memory, choice) = fixed.with_step(self.options, &size, self.device, self.machine_memory)?;
        let (total, layers) = (memory.total(), self.spec.num_hidden_layers());
        let again = |checkpointing: pmetal_models::Checkpointing| {
            (0..layers).filter(|&layer| checkpointing.policy(layer, layers).is_some()).count()
        };
        let limit = self.options.memory_limit.or(self.machine_memory.map(usable));
        Ok(Method {
            name,
            available: true,
            trained,
            memory,
            total,
            layers_run_again: choice.checkpointing.map_or(0, again),
            fits: limit.map(|limit| total <= limit),
        })
    }
}

impl fmt::Display for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, name: &str, text: String| writeln!(f, "{name:<22}{text}");
        line(f, "model", format!("{}, {} layers, {}", self.model_type, self.layers, self.dtype))?;
        let active = self.active_parameters.map(|active| format!(", {active} of them for each token"));
        line(f, "parameters", format!("{}{}", self.parameters, active.unwrap_or_default()))?;
        line(f, "step", format!("{} rows of {} tokens", self.batch_size, self.max_seq_len))?;
        if let Some(memory) = self.machine_memory {
            line(f, "the device has", format!("{} ({})", gib(memory), self.device))?;
        }
        writeln!(f)?;
        let row = |f: &mut fmt::Formatter<'_>, name: &str, cell: &dyn Fn(&Method) -> String| {
            let cells: String = self.methods.iter().map(|method| format!("{:>18}", cell(method))).collect();
            writeln!(f, "{name:<22}{cells}")
        };
        row(f, "memory, about", &|method| {
            if method.available { method.name.into() } else { format!("{}*", method.name) }
        })?;
        row(f, "parameters trained", &|method| method.trained.to_string())?;
        for part in 0..Memory::default().parts().len() {
            row(f, Memory::default().parts()[part].0, &|method| gib(method.memory.parts()[part].1))?;
        }
        row(f, "in all", &|method| gib(method.total))?;
        row(f, "layers that run again", &|method| method.layers_run_again.to_string())?;
        row(f, "fits", &|method| method.fits.map_or("?", |fits| if fits { "yes" } else { "no" }).into())?;
        if self.methods.iter().any(|method| !method.available) {
            writeln!(f, "\n* an estimate, QLoRA training is not there yet: weights of linear layers in")?;
            writeln!(f, "  4-bit NF4, their scales quantised once more, all others in {}", self.dtype)?;
        }
        Ok(())
    }
}
