use std::{
    io::{self, Write},
    ops::ControlFlow,
    path::PathBuf,
};

use pmetal::{
    lora::{Use, attach_file},
    models::{CausalLMModel, Event, SamplingParams, Session},
    ops::{
        device,
        profile::{self as watch, Profile},
    },
};

use super::{median, profile, round, rows::random_ids};
use crate::verbs::{Failure, Result, model_args::ModelArgs};

#[derive(clap::Args)]
#[command(mut_arg("model", |model| model.required(false).required_unless_present("model_config")))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A model's config.json: random weights of its shape, in place of a model
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    model_config: Option<PathBuf>,
    /// Tokens of the prompt, drawn at random
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    prompt_tokens: usize,
    /// Tokens to make behind it
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    tokens: usize,
    /// Runs that are timed, after one that is not
    #[arg(long, default_value_t = 3, value_name = "RUNS")]
    runs: usize,
    /// Also tell where the time of one more run goes, operation by operation, on stderr and in the JSON (on the CPU
    /// and on CUDA)
    #[arg(long)]
    profile: bool,
}

/// The likeliest tokens behind random ones, whether or not the model would end there.
pub fn run(args: &Args) -> Result<()> {
    if args.prompt_tokens == 0 || args.tokens < 2 || args.runs == 0 {
        return Err(Failure::Usage("--prompt-tokens and --runs must be at least 1, --tokens at least 2".into()));
    }
    let adapter = match args.model.adapters() {
        [] => None,
        [adapter] => Some(adapter),
        _ => return Err(Failure::Usage("one --lora at most is timed".into())),
    };
    let mut model = match &args.model_config {
        Some(config) => args.model.random(config)?,
        None => args.model.load(&args.model.checkpoint()?)?,
    };
    let device = model.device();
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
    let mut report = serde_json::json!({
        "prefill_tok_s": round(median(prefill), 1),
        "decode_tok_s": round(median(decode), 1),
        "peak_bytes": device::peak_bytes(&device)?,
        "device": device::name(&device),
        "dtype": model.dtype().as_str(),
        "prompt_tokens": args.prompt_tokens,
        "tokens": tokens,
        "runs": args.runs,
    });
    if args.profile {
        let [reading, making] = watched(model.as_ref(), &prompt, &params)?;
        let steps = tokens.saturating_sub(1).max(1);
        let limits = profile::limits(&device)?;
        let limits = limits.as_ref();
        profile::print("the prompt", &reading, 1, limits)?;
        profile::print("a token", &making, steps, limits)?;
        report["profile"] = serde_json::json!({
            "prefill": profile::json(&reading, 1, limits),
            "decode": profile::json(&making, steps, limits),
        });
        report["limits"] = serde_json::json!(limits);
    }
    Ok(writeln!(io::stdout(), "{report}")?)
}

/// What is done up to the first token of a run and after it.
fn watched(model: &dyn CausalLMModel, prompt: &[u32], params: &SamplingParams) -> Result<[Profile; 2]> {
    let mut session = Session::new(model)?;
    let mut read = None;
    watch::start(&model.device())?;
    let made = session.generate(model, prompt, params, &[], &mut |event| {
        if read.is_none() && matches!(event, Event::Token { .. }) {
            read = Some(watch::finish().and_then(|found| watch::start(&model.device()).map(|()| found)));
        }
        ControlFlow::Continue(())
    });
    let making = watch::finish()?;
    made?;
    Ok([read.transpose()?.unwrap_or_default(), making])
}
