use std::{
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use pmetal::trainer::{Outcome, SftOptions, Written, plan, sft};

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
  pmetal train --model ./base --dataset rows.jsonl --fine-tune-type full \\
      --learning-rate 2e-5";

/// Flags of `pmetal train`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: SftOptions,
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

/// Prints what the run would be.
fn dry_run(args: &Args, stop: Arc<AtomicBool>) -> Result<()> {
    let plan = plan(&args.options, &mut Progress::new(args.options.logging_steps, stop.clone()), &stop)?;
    write!(io::stdout(), "{plan}")?;
    if let Some(warning) = plan.warning() {
        tell(format_args!("warning: {warning}"));
    }
    Ok(())
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
