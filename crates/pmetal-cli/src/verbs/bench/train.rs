use std::{
    io::{self, Write},
    path::PathBuf,
    time::Instant,
};

use candle_core::{DType, Device};
use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    data::Example,
    lora::{LoraConfig, attach},
    models::{self, DecoderSpec},
    ops::{self, device},
    trainer::{MemoryChoice, StepSettings, StepSize, parse_bytes, train_step},
};

use super::{
    median, profile, round,
    rows::{packed_lengths, random_row},
};
use crate::{
    tell::tell,
    verbs::{Failure, Result},
};

/// Steps before those that are timed: products choose their algorithm in the first, the memory of a step settles in the second.
const WARM_UP: usize = 3;

#[derive(clap::Args)]
pub struct Args {
    /// A model's config.json
    #[arg(long, value_name = "FILE")]
    model_config: PathBuf,
    /// Rows of a step
    #[arg(long, default_value_t = 2, value_name = "ROWS")]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    seq: usize,
    /// Pack each step's batch x seq tokens with rows as long as those of instructions and conversations (log-normal, median 256), drawn anew
    /// for each step
    #[arg(long)]
    packed: bool,
    /// Steps that are timed, after three that are not
    #[arg(long, default_value_t = 10, value_name = "STEPS")]
    steps: usize,
    /// Run layers again in backward, so that a step takes the least memory that costs no waiting
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Take at most so much of the device's memory, as in 17.8GiB, and run again what that asks for
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory_limit: Option<u64>,
    /// Also tell where a step's time goes, operation by operation, on stderr and in the JSON (on the CPU and on CUDA)
    #[arg(long)]
    profile: bool,
    /// Dtype of weights and activations: auto (the config's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE")]
    dtype: DTypeChoice,
    /// Device: auto, cpu, cuda, cuda:1 and so on, metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
}

/// LoRA r=16, alpha=32 on every linear layer, AdamW, gradient norm clipped at 1: what the peers' scripts run. Time and the peak of memory are
/// those of the timed steps.
pub fn run(args: &Args) -> Result<()> {
    if args.batch == 0 || args.seq < 2 || args.steps == 0 {
        return Err(Failure::Usage("--batch and --steps must be at least 1, --seq at least 2".into()));
    }
    let config = models::read_config(&args.model_config)?;
    let dtype = args.dtype.resolve(models::dtype_of(&config).unwrap_or(DType::BF16));
    let device = device::open(args.device)?;
    let mut model = models::random(&config, dtype, &device, 0, None)?;
    let arena = attach(model.as_mut(), &LoraConfig::default(), 0)?;
    let memory = choose_memory(args, model.spec(), dtype, &device)?;
    let settings = StepSettings {
        max_grad_norm: 1.0,
        weight_decay: 0.0,
        checkpointing: memory.checkpointing,
        logits_bytes: memory.logits_bytes as usize,
        seed: 0,
    };
    let steps: Vec<_> = (0..WARM_UP + args.steps).map(|step| rows_of(args, step, model.spec().vocab_size)).collect();
    let mut milliseconds = Vec::with_capacity(args.steps);
    let mut loss = 0.0;
    for (step, rows) in steps.iter().enumerate() {
        if step == WARM_UP {
            device::reset_peak(&device)?;
            if args.profile {
                ops::profile::start(&device)?;
            }
        }
        let batch = [rows.iter().collect()];
        let started = Instant::now();
        let result = train_step(model.as_ref(), &arena, &batch, step, 2e-4, step as u64 + 1, &settings)?;
        loss = result.loss;
        if step >= WARM_UP {
            milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let found = args.profile.then(ops::profile::finish).transpose()?;
    let fastest = milliseconds.iter().copied().fold(f64::INFINITY, f64::min);
    let median = median(milliseconds);
    let mut report = serde_json::json!({
        "tok_s": round((args.batch * args.seq) as f64 / median * 1e3, 1),
        "step_ms": round(median, 2),
        "fastest_step_ms": round(fastest, 2),
        "peak_bytes": device::peak_bytes(&device)?,
        "loss": loss,
        "device": device::name(&device),
        "dtype": dtype.as_str(),
        "batch": args.batch,
        "seq": args.seq,
        "packed": args.packed,
        "gradient_checkpointing": settings.checkpointing.is_some(),
        "memory_limit": args.memory_limit,
        "steps": args.steps,
    });
    if let Some(found) = found {
        let limits = profile::limits(&device)?;
        profile::print("a step", &found, args.steps, limits.as_ref())?;
        report["profile"] = profile::json(&found, args.steps, limits.as_ref());
        report["limits"] = serde_json::json!(limits);
    }
    Ok(writeln!(io::stdout(), "{report}")?)
}

/// What runs again within the memory that flags leave; says so.
fn choose_memory(args: &Args, spec: &DecoderSpec, dtype: DType, device: &Device) -> Result<MemoryChoice> {
    device::synchronize(device)?;
    let fixed = device::memory(device)?.map_or(ops::memory::live_bytes() as u64, |memory| memory.live);
    let size = StepSize {
        spec,
        width: dtype.size_in_bytes() as u64,
        rank: LoraConfig::default().r as u64,
        tokens: (args.batch * args.seq) as u64,
        longest: args.seq as u64,
    };
    let again = args.gradient_checkpointing;
    let rates = if again || args.memory_limit.is_some() { ops::rates(device)? } else { None };
    let choice = size.choose(args.memory_limit.map(|limit| limit.saturating_sub(fixed)), again, rates);
    if let Some(line) = choice.line(spec.num_hidden_layers(), fixed) {
        tell(line);
    }
    if !choice.fits {
        tell("that is more than --memory-limit");
    }
    Ok(choice)
}

/// The rows of a step; without packing, the same for all.
fn rows_of(args: &Args, step: usize, vocab_size: usize) -> Vec<Example> {
    let lengths = match args.packed {
        true => packed_lengths(step as u64, args.batch * args.seq, args.seq),
        false => vec![args.seq; args.batch],
    };
    lengths.into_iter().enumerate().map(|(row, tokens)| random_row(row as u64, tokens, vocab_size)).collect()
}
