use std::{
    fmt::Display,
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use pmetal::trainer::{Outcome, SftOptions, Written, outline, plan, sft};
use serde_json::{Value, json};

use super::Result;
use crate::{progress::Progress, tell::tell};

/// Examples shown under `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pmetal train --model ./SmolLM2-135M-Instruct.gguf --dataset rows.jsonl \\
      --eval-split 0.1
  pmetal train --model ./Qwen3-0.6B --dataset rows.jsonl --epochs 3 \\
      --max-seq-len 2048 --packing
  pmetal train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset rows.csv \\
      --columns instruction=question,output=answer --dry-run
  pmetal train --model ./config.json --batch-size 1 --max-seq-len 4096 --dry-run
  pmetal train --model ./base --dataset rows.jsonl --fine-tune-type full \\
      --learning-rate 2e-5";

/// Flags of `pmetal train`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: SftOptions,
    /// With --dry-run, print one JSON object
    #[arg(long, requires = "dry_run", help_heading = "Output")]
    json: bool,
}

/// A dry run tells of a model without rows too.
pub fn unless_dry_run(arg: clap::Arg) -> clap::Arg {
    arg.required(false).required_unless_present("dry_run")
}

/// Trains, writes the result, and says where it is and how to talk to it.
pub fn run(args: &Args) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        tell("\ninterrupted: finishing this step, then writing what was trained (Ctrl-C again leaves at once)");
    });
    if let Err(e) = handler {
        tell(format_args!("Ctrl-C will end the run without writing: {e}"));
    }
    if args.options.dry_run {
        return dry_run(args, stop);
    }
    let outcome = sft(&args.options, &mut Progress::new(args.options.logging_steps, stop.clone()), &stop)?;
    report(&args.options, &outcome)
}

/// Prints what the run would be; of a configuration alone, what it would take.
fn dry_run(args: &Args, stop: Arc<AtomicBool>) -> Result<()> {
    let mut progress = Progress::new(args.options.logging_steps, stop.clone());
    if let Some(outline) = outline(&args.options, &mut progress)? {
        return print(args, &outline, &json!(outline));
    }
    let plan = plan(&args.options, &mut progress, &stop)?;
    print(args, &plan, &json!(plan))?;
    if let Some(warning) = plan.warning() {
        tell(format_args!("warning: {warning}"));
    }
    Ok(())
}

fn print(args: &Args, text: &impl Display, json: &Value) -> Result<()> {
    let text = if args.json { format!("{json:#}\n") } else { text.to_string() };
    Ok(io::stdout().write_all(text.as_bytes())?)
}

fn report(options: &SftOptions, outcome: &Outcome) -> Result<()> {
    let s = &outcome.summary;
    let rate = if s.seconds > 0.0 { s.tokens as f64 / s.seconds } else { 0.0 };
    tell(format_args!("{} of {} steps, {} tokens, {rate:.0} tok/s", s.steps, s.planned_steps, s.tokens));
    if let (Some(before), Some(after)) = (s.eval_loss_before, s.eval_loss_after) {
        tell(format_args!("eval loss {before:.4} before, {after:.4} after"));
    }
    let output = shown(&options.output);
    if s.interrupted {
        tell(format_args!("interrupted: what was trained so far is in {output}"));
    }
    match &outcome.written {
        Written::Adapter => {
            writeln!(io::stdout(), "adapter: {output}")?;
            tell(format_args!(
                "try it: pmetal infer --model {} --lora {output} --chat --prompt \"…\"",
                shown(&options.model)
            ));
        }
        Written::Model => {
            writeln!(io::stdout(), "model: {output}")?;
            tell(format_args!("try it: pmetal infer --model {output} --chat --prompt \"…\""));
        }
    }
    Ok(())
}

/// A path as one would type it.
fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    if text.contains(char::is_whitespace) { format!("'{text}'") } else { text }
}
