use std::{
    collections::BTreeSet,
    io::{self, Write},
    ops::ControlFlow,
};

use pmetal::{
    data::{Message, Template, TemplateChoice, Tokenizer},
    models::{Checkpoint, Generation, GenerationConfig, SamplingParams, generate},
};

use super::{ModelArgs, Result};
use crate::{tell::tell, thinking::ThinkFilter};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal infer --model ./model --chat --prompt \"What is the capital of France?\"
  pmetal infer --model ./model.gguf --lora ./output --chat --system \"Be brief.\" --prompt \"Why is the sky blue?\" --temperature 0.7
  pmetal infer --model ./base --prompt \"Once upon a time\" --max-tokens 64";

/// Flags of `pmetal infer`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What to continue, or with --chat to answer
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Put the prompt through the chat template
    #[arg(long)]
    chat: bool,
    /// System turn before the prompt
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Chat template: auto (the model's own), a built-in one (chatml, llama-3, gemma, qwen-3, ...), or a Jinja file
    #[arg(long, default_value = "auto", value_name = "NAME|FILE", requires = "chat")]
    chat_template: TemplateChoice,
    /// Print the reasoning between think tags too
    #[arg(long)]
    show_thinking: bool,
    /// 0 picks the likeliest token each time [default: the model's, else 0]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Sample among the K likeliest tokens, 0 for all [default: the model's, else 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Sample among the likeliest tokens that hold this share together [default: the model's, else 1]
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Leave out tokens less likely than this share of the likeliest
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Tokens to write at most
    #[arg(long, visible_alias = "max-new-tokens", default_value_t = 256, value_name = "TOKENS")]
    max_tokens: usize,
    /// Above 1 makes tokens that occurred less likely [default: the model's, else 1]
    #[arg(long, value_name = "PENALTY")]
    repetition_penalty: Option<f64>,
    /// Seed of the sampler
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Streams the completion to stdout, and the speed to stderr.
pub fn run(args: &Args) -> Result<()> {
    let (checkpoint, model) = args.model.open()?;
    let tokenizer = Tokenizer::from_model_path(checkpoint.path())?;
    let template = args.chat.then(|| Template::choose(&args.chat_template, &tokenizer)).transpose()?;
    let (prompt, ids) = prompt(args, &tokenizer, template.as_ref())?;
    if ids.is_empty() {
        return Err(super::Failure::Usage(
            "--prompt: is empty, and this model has no token to begin a text with".into(),
        ));
    }
    let stop_ids = stop_ids(&checkpoint, &tokenizer, template.as_ref());
    let mut filter = (!args.show_thinking).then(|| ThinkFilter::new(&prompt));
    let mut stream = tokenizer.stream();
    let mut out = io::stdout().lock();
    let mut failure = None;
    let generation = generate(model.as_ref(), &ids, &sampling(args, checkpoint.generation()), &stop_ids, &mut |id| {
        let printed = stream.push(id).map_err(super::Failure::from).and_then(|text| {
            let text = match &mut filter {
                Some(filter) => filter.push(&text),
                None => text,
            };
            out.write_all(text.as_bytes())?;
            Ok(out.flush()?)
        });
        match printed {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failure = Some(e);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    let rest = stream.finish()?;
    let rest = match filter {
        Some(mut filter) => filter.push(&rest) + &filter.finish(),
        None => rest,
    };
    writeln!(out, "{rest}")?;
    tell(speed(ids.len(), &generation));
    Ok(())
}

/// The prompt as text and as ids.
fn prompt(args: &Args, tokenizer: &Tokenizer, template: Option<&Template>) -> Result<(String, Vec<u32>)> {
    let Some(template) = template else {
        return Ok((args.prompt.clone(), tokenizer.encode(&args.prompt, true)?));
    };
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.chain([Message::new("user", &args.prompt)]).collect();
    let text = template.render(&messages, true)?;
    let ids = tokenizer.encode(&text, false)?;
    Ok((text, ids))
}

/// Every id that ends a completion: the model's, the tokenizer's, and the template's end of turn.
fn stop_ids(checkpoint: &Checkpoint, tokenizer: &Tokenizer, template: Option<&Template>) -> Vec<u32> {
    let mut ids: BTreeSet<u32> = checkpoint.generation().eos_token_ids.iter().copied().collect();
    ids.extend(tokenizer.eos_ids());
    ids.extend(template.and_then(|t| t.end_of_turn(tokenizer)));
    ids.into_iter().collect()
}

/// What the flags say, then what the model's generation_config.json says, then greedy.
fn sampling(args: &Args, model: &GenerationConfig) -> SamplingParams {
    let samples = model.do_sample.unwrap_or(false);
    let models_temperature = if samples { model.temperature.unwrap_or(1.0) } else { 0.0 };
    SamplingParams {
        temperature: args.temperature.unwrap_or(models_temperature),
        top_k: args.top_k.or(model.top_k).unwrap_or(0),
        top_p: args.top_p.or(model.top_p).unwrap_or(1.0),
        min_p: args.min_p.or(model.min_p).unwrap_or(0.0),
        repetition_penalty: args.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
        seed: args.seed,
        max_tokens: args.max_tokens,
    }
}

fn speed(prompt_tokens: usize, generation: &Generation) -> String {
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    format!(
        "prompt: {prompt_tokens} tokens, {:.1} tok/s; decode: {} tokens, {:.1} tok/s",
        rate(prompt_tokens, generation.prompt_seconds),
        generation.tokens.len(),
        rate(generation.tokens.len(), generation.decode_seconds),
    )
}
