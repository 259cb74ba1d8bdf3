use std::{
    io::{self, Write},
    ops::ControlFlow,
    path::PathBuf,
    time::Instant,
};

use candle_core::DType;
use pmetal::{
    core::{DTypeChoice, DeviceChoice},
    data::Example,
    lora::{LoraConfig, Use, attach, attach_file},
    models::{self, SamplingParams, Session},
    ops::{Policy, device, random},
    trainer::{StepSettings, train_step},
};

use super::{Failure, Result, model_args::ModelArgs};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal bench train --model-config config.json --batch 2 --seq 512 --steps 5
  pmetal bench generate --model ./model --prompt-tokens 512 --tokens 128";

/// Flags of `pmetal bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Time LoRA training steps on random weights of a given shape; prints one JSON object
    #[command(after_long_help = EXAMPLES)]
    Train(TrainArgs),
    /// Time reading a prompt and making tokens with a model; prints one JSON object
    #[command(after_long_help = EXAMPLES)]
    Generate(GenerateArgs),
}

#[derive(clap::Args)]
struct TrainArgs {
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
    /// Dtype of weights and activations: auto (the config's), bf16, f16, f32
    #[arg(long, default_value_t, value_name = "DTYPE")]
    dtype: DTypeChoice,
    /// Device: auto, cpu, cuda, cuda:1 and so on, metal
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceChoice,
}

#[derive(clap::Args)]
struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt, drawn at random
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    prompt_tokens: usize,
    /// Tokens to make behind it
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    tokens: usize,
    /// Runs that are timed, after one that is not
    #[arg(long, default_value_t = 3, value_name = "RUNS")]
    runs: usize,
}

/// Runs the benchmark that was asked for.
pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Train(args) => train(args),
        What::Generate(args) => generate(args),
    }
}

/// The likeliest tokens behind random ones, whether or not the model would end there.
fn generate(args: &GenerateArgs) -> Result<()> {
    if args.prompt_tokens == 0 || args.tokens < 2 || args.runs == 0 {
        return Err(Failure::Usage("--prompt-tokens and --runs must be at least 1, --tokens at least 2".into()));
    }
    let adapter = match args.model.adapters() {
        [] => None,
        [adapter] => Some(adapter),
        _ => return Err(Failure::Usage("one --lora at most is timed".into())),
    };
    let checkpoint = args.model.checkpoint()?;
    let mut model = args.model.load(&checkpoint)?;
    if let Some(adapter) = adapter {
        attach_file(model.as_mut(), &args.model.adapter(adapter)?, Use::Inference)?;
    }
    let prompt = random_ids(0, args.prompt_tokens, model.spec().vocab_size);
    let params = SamplingParams { max_tokens: args.tokens, ..SamplingParams::default() };
    let (mut prefill, mut decode) = (Vec::with_capacity(args.runs), Vec::with_capacity(args.runs));
    let mut tokens = 0;
    for run in 0..=args.runs {
        let mut session = Session::new(model.as_ref())?;
        let made = session.generate(model.as_ref(), &prompt, &params, &[], &mut |_| ControlFlow::Continue(()))?;
        // fewer where the model's context ends
        tokens = made.tokens.len();
        if run > 0 {
            prefill.push(args.prompt_tokens as f64 / made.prompt_seconds);
            // the prompt's last logits give the first token
            decode.push(tokens.saturating_sub(1) as f64 / made.decode_seconds);
        }
    }
    let device = model.device();
    let report = serde_json::json!({
        "prefill_tok_s": round(median(prefill), 1),
        "decode_tok_s": round(median(decode), 1),
        "peak_bytes": device::peak_bytes(&device)?,
        "device": device::name(&device),
        "dtype": model.dtype().as_str(),
        "prompt_tokens": args.prompt_tokens,
        "tokens": tokens,
        "runs": args.runs,
    });
    Ok(writeln!(io::stdout(), "{report}")?)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// LoRA r=16, alpha=32 on every linear layer, AdamW, gradient norm clipped at 1: what the peers' scripts run.
fn train(args: &TrainArgs) -> Result<()> {
    if args.batch == 0 || args.seq < 2 || args.steps == 0 {
        return Err(Failure::Usage("--batch and --steps must be at least 1, --seq at least 2".into()));
    }
    let config = models::read_config(&args.model_config)?;
    let dtype = args.dtype.resolve(models::dtype_of(&config).unwrap_or(DType::BF16));
    let device = device::open(args.device)?;
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
        let started = Instant::now();
        let result = train_step(model.as_ref(), &arena, &batch, step, 2e-4, step as u64 + 1, &settings)?;
        loss = result.loss;
        if step > 0 {
            milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let median = median(milliseconds);
    let report = serde_json::json!({
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
    Ok(writeln!(io::stdout(), "{report}")?)
}

fn random_rows(args: &TrainArgs, vocab_size: usize) -> Vec<Example> {
    let row = |r: usize| {
        let input_ids = random_ids(r as u64, args.seq, vocab_size);
        let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
        Example { input_ids, labels }
    };
    (0..args.batch).map(row).collect()
}

fn random_ids(seed: u64, count: usize, vocab_size: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (random::uniform(seed, i) * vocab_size as f32) as u32).collect()
}

fn round(x: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (x * unit).round() / unit
}
