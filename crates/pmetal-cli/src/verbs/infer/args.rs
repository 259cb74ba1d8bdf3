use std::{
    io::{self, IsTerminal, Read},
    path::PathBuf,
};

use pmetal::{
    data::TemplateChoice,
    models::{Checkpoint, Error as ModelError, Sampler, SamplingParams},
};

use super::prompts::{self, Row};
use crate::verbs::{Failure, ModelArgs, Result};

/// Flags of `pmetal infer`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// What to continue, or with --chat to answer. Without it the prompt is all of stdin; where that is a terminal, a chat begins
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    pub prompt: Option<String>,
    /// Prompts to answer one after another: JSON lines or a JSON array of {"prompt": "…"} or {"messages": […]}, or a .txt file
    /// with one per line
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// JSON lines for the answers to --prompt-file, each with what its row had; without it they go to stdout
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Put prompts through the chat template, as a chat and rows of messages always do
    #[arg(long)]
    pub chat: bool,
    /// System turn before the prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Chat template: auto (the model's own), chatml, llama-3, alpaca, or a Jinja file [default: auto]
    #[arg(long, value_name = "NAME|FILE")]
    pub chat_template: Option<TemplateChoice>,
    /// Print the reasoning between think tags too
    #[arg(long, conflicts_with_all = ["json", "prompt_file"])]
    pub show_thinking: bool,
    /// Print one JSON object: the completion, why it ended, the tokens of prompt and completion
    #[arg(long, conflicts_with = "prompt_file")]
    pub json: bool,
    /// With --json or --prompt-file: the log-probability of each token and of the N likeliest in its place, of the model itself,
    /// before penalty and temperature
    #[arg(long, value_name = "N")]
    pub logprobs: Option<usize>,
    /// End the answer before this text (reasoning is not searched); may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// 0 picks the likeliest token each time [default: the model's, else 0]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Sample among the K likeliest tokens, 0 for all [default: the model's, else 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample among the likeliest tokens that hold this share together [default: the model's, else 1]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Leave out tokens less likely than this share of the likeliest [default: the model's, else 0]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Tokens to write at most
    #[arg(long, visible_alias = "max-new-tokens", default_value_t = 256, value_name = "TOKENS")]
    pub max_tokens: usize,
    /// Above 1 makes tokens that occurred less likely [default: the model's, else 1]
    #[arg(long, value_name = "PENALTY")]
    pub repetition_penalty: Option<f64>,
    /// Seed of the sampler
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Where a prompt comes from that no flag gives.
pub const STDIN: &str = "stdin";

/// What is wanted of the model.
pub enum Ask {
    /// A chat at the terminal.
    Chat,
    /// An answer.
    One {
        /// The prompt.
        prompt: String,
        /// Where it comes from, for errors: `--prompt` or `stdin`.
        origin: &'static str,
    },
    /// An answer to each row of a file.
    File(Vec<Row>),
}

impl Args {
    /// Reads what is asked, and refuses flags that would do nothing.
    pub fn ask(&self) -> Result<Ask> {
        if self.stop.iter().any(String::is_empty) {
            return usage("--stop: is empty, expected a text");
        }
        if self.logprobs.is_some() && !self.json && self.prompt_file.is_none() {
            return usage("--logprobs: add --json, or give the prompts with --prompt-file");
        }
        if self.output.is_some() && self.prompt_file.is_none() {
            return usage("--output: is for the answers to a --prompt-file");
        }
        let ask = match (&self.prompt, &self.prompt_file) {
            (Some(prompt), _) => Ask::One { prompt: prompt.clone(), origin: "--prompt" },
            (None, Some(file)) => Ask::File(prompts::read(file)?),
            (None, None) if io::stdin().is_terminal() => Ask::Chat,
            (None, None) => Ask::One { prompt: all_of_stdin()?, origin: STDIN },
        };
        if matches!(ask, Ask::Chat) && self.json {
            return usage("--json: give a --prompt");
        }
        if !self.uses_template(&ask) {
            for (flag, given) in
                [("--system", self.system.is_some()), ("--chat-template", self.chat_template.is_some())]
            {
                if given {
                    return usage(format!("{flag}: the prompt does not go through a chat template; add --chat"));
                }
            }
        }
        Ok(ask)
    }

    /// Whether anything that is asked goes through the chat template.
    pub fn uses_template(&self, ask: &Ask) -> bool {
        match ask {
            Ask::Chat => true,
            Ask::One { .. } => self.chat,
            Ask::File(rows) => self.chat || rows.iter().any(Row::is_conversation),
        }
    }

    /// What the flags say, then what the model's generation_config.json says, then greedy.
    pub fn sampling(&self, checkpoint: &Checkpoint) -> Result<SamplingParams> {
        let model = checkpoint.generation();
        let samples = model.do_sample.unwrap_or(false);
        let models_temperature = if samples { model.temperature.unwrap_or(1.0) } else { 0.0 };
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(models_temperature),
            top_k: self.top_k.or(model.top_k).unwrap_or(0),
            top_p: self.top_p.or(model.top_p).unwrap_or(1.0),
            min_p: self.min_p.or(model.min_p).unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
            seed: self.seed,
            max_tokens: self.max_tokens,
            logprobs: self.logprobs,
        };
        match Sampler::new(&params) {
            Ok(_) => Ok(params),
            Err(ModelError::Setting { key, got, expected }) if self.gives(key) => {
                usage(format!("--{}: is {got}, expected {expected}", key.replace('_', "-")))
            }
            Err(ModelError::Setting { key, got, expected }) => {
                let flag = key.replace('_', "-");
                let reason = format!("{key} is {got}, expected {expected}; set it with --{flag}");
                Err(Failure::Content { path: checkpoint.path().join("generation_config.json"), reason })
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Whether a sampling setting comes from a flag.
    fn gives(&self, key: &str) -> bool {
        match key {
            "temperature" => self.temperature.is_some(),
            "top_p" => self.top_p.is_some(),
            "min_p" => self.min_p.is_some(),
            _ => self.repetition_penalty.is_some(),
        }
    }

    /// The flags that choose among tokens, where the temperature leaves nothing to choose.
    pub fn idle_flags(&self, params: &SamplingParams) -> Vec<&'static str> {
        let given =
            [("--top-k", self.top_k.is_some()), ("--top-p", self.top_p.is_some()), ("--min-p", self.min_p.is_some())];
        given.into_iter().filter(|&(_, given)| given && params.temperature == 0.0).map(|(flag, _)| flag).collect()
    }
}

fn usage<T>(message: impl Into<String>) -> Result<T> {
    Err(Failure::Usage(message.into()))
}

/// Stdin to its end, less the line break that ends it.
fn all_of_stdin() -> Result<String> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Failure::Usage(format!("stdin: cannot be read: {e}")))?;
    let mut text = String::from_utf8(bytes).map_err(|_| Failure::Usage("stdin: is not UTF-8 text".into()))?;
    for end in ['\n', '\r'] {
        text.truncate(text.strip_suffix(end).map_or(text.len(), str::len));
    }
    Ok(text)
}
