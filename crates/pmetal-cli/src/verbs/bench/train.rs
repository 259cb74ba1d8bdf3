use std::{
    io::{self, Write},
    path::PathBuf,
    time::Instant,
};

use candle_core::DType;
use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    data::Example,
    lora::{LoraConfig, attach},
    models,
    ops::{self, Policy, device},
    trainer::{StepSettings, train_step},
};

use super::{median, profile, random_ids, round};
use crate::verbs::{Failure, Result};

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
    /// Steps that are timed, after one that is not
    #[arg(long, default_value_t = 5, value_name = "STEPS")]
    steps: usize,
    /// Keep only the inputs of each layer and run it again in backward
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Also tell where a step's time goes, operation by operation, on stderr and in the JSON (on the CPU)
    #[arg(long)]
    profile: bool,
    /// Dtype of weights and activations: auto (the config's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE")]
    dtype: DTypeChoice,
    /// Device: auto, cpu, cuda, cuda:1 and so on, metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
}

/// LoRA r=16, alpha=32 on every linear layer, AdamW, gradient norm clipped at 1: what the peers' scripts run.
pub fn run(args: &Args) -> Result<()> {
    if args.batch == 0 || args.seq < 2 || args.steps == 0 {
        return Err(Failure::Usage("--batch and --steps must be at least 1, --seq at least 2".into()));
    }
    let config = models::read_config(&args.model_config)?;
    let dtype = args.dtype.resolve(models::dtype_of(&config).unwrap_or(DType::BF16));
    let device = device::open(args.device)?;
    profile::check(args.profile, &device)?;
    let mut model = models::random(&config, dtype, &device, 0, None)?;
    let arena = attach(model.as_mut(), &LoraConfig::default(), 0)?;
    let rows = random_rows(args, model.spec().vocab_size);
    let batch = [rows.iter().collect()];
    let settings = StepSettings {
        max_grad_norm: 1.0,
        weight_decay: 0.0,
        checkpointing: args.gradient_checkpointing.then_some(Policy::KeepNothing),
        seed: 0,
    };
    let mut milliseconds = Vec::with_capacity(args.steps);
    let mut loss = 0.0;
    for step in 0..=args.steps {
        if step == 1 && args.profile {
            ops::profile::start();
        }
        let started = Instant::now();
        let result = train_step(model.as_ref(), &arena, &batch, step, 2e-4, step as u64 + 1, &settings)?;
        loss = result.loss;
        if step > 0 {
            milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let found = args.profile.then(ops::profile::finish);
    let median = median(milliseconds);
    let mut report = serde_json::json!({
        "tok_s": round((args.batch * args.seq) as f64 / median * 1e3, 1),
        "step_ms": round(median, 2),
        "peak_bytes": device::peak_bytes(&device)?,
        "loss": loss,
        "device": device::name(&device),
        "dtype": dtype.as_str(),
        "batch": args.batch,
        "seq": args.seq,
        "steps": args.steps,
    });
    if let Some(found) = found {
        profile::print("a step", &found, args.steps)?;
        report["profile"] = profile::json(&found, args.steps);
    }
    Ok(writeln!(io::stdout(), "{report}")?)
}

fn random_rows(args: &Args, vocab_size: usize) -> Vec<Example> {
    let row = |r: usize| {
        let input_ids = random_ids(r as u64, args.seq, vocab_size);
        let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
        Example { input_ids, labels }
    };
    (0..args.batch).map(row).collect()
}
