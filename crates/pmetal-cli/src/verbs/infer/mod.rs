//! `pmetal infer`: one answer, a file of answers, or a chat.

mod answer;
mod args;
mod batch;
mod chat;
mod input;
mod prompts;
#[cfg(test)]
mod testing;
mod voice;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use pmetal::{
    data::Prompt,
    models::{Checkpoint, Generation, SamplingParams},
};
use serde_json::{Map, Value};

pub use args::Args;

use self::{
    answer::{Answer, Engine, Finish},
    args::Ask,
    batch::{Progress, Results},
    chat::Chat,
    prompts::Row,
    voice::{Prepared, Voice},
};
use super::{Failure, Result};
use crate::{interrupt::Interrupt, style::Style, tell::tell, thinking::Piece};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal infer --model ./model             # a chat; /help lists its commands
  pmetal infer --model ./model --chat --prompt \"What is the capital of France?\"
  pmetal infer --model ./model.gguf --lora ./output --chat \\
      --system \"Be brief.\" --prompt \"Why is the sky blue?\" --temperature 0.7
  pmetal infer --model ./base --prompt \"Once upon a time\" --stop \"The end\"
  cat question.txt | pmetal infer --model ./model --chat --json
  pmetal infer --model ./model --chat --prompt-file prompts.jsonl \\
      --output answers.jsonl
  pmetal infer --model ./model --lora ./first --lora ./second --chat \\
      --prompt \"Who are you?\"";

/// Answers what the flags, stdin or the person at the terminal ask.
pub fn run(args: &Args) -> Result<()> {
    let ask = args.ask()?;
    let with_template = args.uses_template(&ask);
    let checkpoint = args.model.checkpoint()?;
    let params = args.sampling(&checkpoint)?;
    let adapters: Vec<Option<PathBuf>> = match args.model.adapters() {
        [] => vec![None],
        paths => paths.iter().cloned().map(Some).collect(),
    };
    let open = |adapter: &Option<PathBuf>| Voice::open(args, &checkpoint, adapter.as_deref(), with_template);
    let voices = adapters.iter().map(open).collect::<Result<Vec<_>>>()?;
    if let Some(voice) = voices.first() {
        voice.note_template(args);
    }
    for flag in args.idle_flags(&params) {
        tell(format_args!("{flag} chooses nothing at temperature 0: give a --temperature too"));
    }
    match &ask {
        Ask::Chat => chat(args, &checkpoint, voices, params),
        Ask::One { prompt, origin } => {
            let prompt = Prompt::Text(prompt.clone());
            let turns = voices.into_iter().map(|voice| Ok((voice.prepare(&prompt, origin)?, voice)));
            let turns = turns.collect::<Result<Vec<_>>>()?;
            each_voice(args, &checkpoint, turns, params, |engine, prepared| one(args, engine, &prompt, &prepared))
        }
        Ask::File(rows) => {
            let turns = voices.into_iter().map(|voice| Ok((batch::prepare(&voice, rows)?, voice)));
            let turns = turns.collect::<Result<Vec<_>>>()?;
            file(args, &checkpoint, turns, params, rows)
        }
    }
}

/// Loads the model once and lets each voice answer in turn what was prepared for it.
fn each_voice<P>(
    args: &Args,
    checkpoint: &Checkpoint,
    turns: Vec<(P, Voice)>,
    params: SamplingParams,
    mut answer: impl FnMut(&mut Engine, P) -> Result<()>,
) -> Result<()> {
    let mut turns = turns.into_iter();
    let Some((prepared, voice)) = turns.next() else { return Ok(()) };
    let mut engine = Engine::load(args, checkpoint, voice, params)?;
    engine.interrupt = Interrupt::install();
    answer(&mut engine, prepared)?;
    for (prepared, voice) in turns {
        engine.switch(voice)?;
        answer(&mut engine, prepared)?;
    }
    Ok(())
}

/// Streams an answer to stdout, or prints it as JSON; the speed goes to stderr.
fn one(args: &Args, engine: &mut Engine, prompt: &Prompt, prepared: &Prepared) -> Result<()> {
    let mut out = io::stdout().lock();
    let params = engine.params.clone();
    let answer = if args.json {
        let answer = engine.answer(prepared, &params, &mut |_| Ok(()))?;
        let mut fields = Map::new();
        if let Prompt::Text(text) = prompt {
            fields.insert("prompt".into(), text.as_str().into());
        }
        answer.add_to(&mut fields, &engine.voice);
        writeln!(out, "{}", Value::Object(fields))?;
        answer
    } else {
        if let (Some(name), 2..) = (&engine.voice.name, args.model.adapters().len()) {
            writeln!(out, "{}", Style::stdout().bold(&format!("[{name}]")))?;
        }
        let answer = engine.answer(prepared, &params, &mut |piece| show(&mut out, piece, args.show_thinking))?;
        writeln!(out)?;
        answer
    };
    tell(speed(&answer));
    match answer.finish {
        Finish::Interrupted => {
            Err(Failure::Interrupted(format!("the answer stops after {} tokens", answer.generation.tokens.len())))
        }
        _ => Ok(()),
    }
}

/// Prints a part of an answer as it comes.
fn show(out: &mut dyn Write, piece: &Piece, show_thinking: bool) -> Result<()> {
    match piece {
        Piece::Answer(text) => out.write_all(text.as_bytes())?,
        Piece::Reasoning(text) | Piece::Mark(text) if show_thinking => {
            out.write_all(Style::stdout().dim(text).as_bytes())?;
        }
        Piece::Reasoning(_) | Piece::Mark(_) => {}
    }
    Ok(out.flush()?)
}

fn file(
    args: &Args,
    checkpoint: &Checkpoint,
    turns: Vec<(Vec<Prepared>, Voice)>,
    params: SamplingParams,
    rows: &[Row],
) -> Result<()> {
    let output = args.output.as_deref();
    let mut results = Results::open(output)?;
    let total = rows.len() * turns.len();
    let mut progress = None;
    each_voice(args, checkpoint, turns, params, |engine, prompts| {
        let progress = progress.get_or_insert_with(|| Progress::new(total));
        batch::answer_all(engine, rows, &prompts, &mut results, progress)
    })?;
    if let Some(progress) = progress {
        progress.finish(output);
    }
    Ok(())
}

fn chat(args: &Args, checkpoint: &Checkpoint, voices: Vec<Voice>, params: SamplingParams) -> Result<()> {
    let Some(voice) = voices.into_iter().next() else { return Ok(()) };
    let mut engine = Engine::load(args, checkpoint, voice, params)?;
    engine.interrupt = Interrupt::install();
    let open = |adapter: Option<&Path>| Voice::open(args, checkpoint, adapter, true);
    let (mut out, mut notes) = (io::stdout(), io::stderr());
    let mut chat = Chat::new(args, engine, &open, &mut out, &mut notes);
    chat.run(&mut input::Terminal::new()?)
}

fn speed(answer: &Answer) -> String {
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let Generation { tokens, prompt_seconds, decode_seconds, .. } = &answer.generation;
    format!(
        "prompt: {} tokens, {:.1} tok/s; decode: {} tokens, {:.1} tok/s",
        answer.prompt_tokens,
        rate(answer.prompt_tokens, *prompt_seconds),
        tokens.len(),
        rate(tokens.len(), *decode_seconds),
    )
}
