//! The chat: what is said, and the commands between.

use std::{fs::OpenOptions, io::Write, path::Path};

use pmetal::{
    core::Error as FileError,
    data::{Conversation, Message},
    models::{Error as ModelError, SamplingParams},
};
use serde_json::{Value, json};

use super::{
    answer::{Answer, Engine, Finish},
    args::Args,
    input::{Line, Lines, read_input},
    show,
    voice::Voice,
};
use crate::{
    style::Style,
    verbs::{Failure, Result},
};

const HELP: &str = r#"  /reset          forget the conversation; the system turn stays
  /system TEXT    set the system turn; off takes it away, no text shows it
  /retry          answer the last question again, with another seed
  /save FILE      append the conversation to a file of rows for pmetal train
  /lora PATH      go on with another adapter; off for none, no path shows it
  /exit           leave, as Ctrl-D does
A line that ends in \ goes on in the next; between two lines of """ all is one
input. Ctrl-C stops an answer. A line that begins with a space is no command."#;

/// Opens the voice of an adapter.
pub type OpenVoice<'a> = &'a dyn Fn(Option<&Path>) -> Result<Voice>;

/// A conversation at the terminal.
pub struct Chat<'a> {
    engine: Engine,
    open_voice: OpenVoice<'a>,
    /// The adapters the command was given.
    adapters: Vec<String>,
    model: String,
    show_thinking: bool,
    system: Option<String>,
    /// Without the system turn.
    turns: Vec<Message>,
    /// Answers so far: each draws with a seed of its own.
    answers: u64,
    warned: bool,
    out: &'a mut dyn Write,
    notes: &'a mut dyn Write,
}

/// Whether the chat goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Go,
    Leave,
}

impl<'a> Chat<'a> {
    /// A chat that prints answers to `out` and the rest to `notes`.
    pub fn new(
        args: &Args,
        engine: Engine,
        open_voice: OpenVoice<'a>,
        out: &'a mut dyn Write,
        notes: &'a mut dyn Write,
    ) -> Self {
        Self {
            engine,
            open_voice,
            adapters: args.model.adapters().iter().map(|path| path.display().to_string()).collect(),
            model: args.model.name().file_name().unwrap_or(args.model.name().as_os_str()).display().to_string(),
            show_thinking: args.show_thinking,
            system: args.system.clone(),
            turns: Vec::new(),
            answers: 0,
            warned: false,
            out,
            notes,
        }
    }

    /// Talks until the person leaves.
    pub fn run(&mut self, lines: &mut dyn Lines) -> Result<()> {
        self.greet()?;
        let (prompt, more) = (Style::stdout().bold("> "), Style::stdout().dim(". "));
        loop {
            let text = match read_input(lines, &prompt, &more)? {
                Some(Line::Text(text)) => text,
                Some(Line::End) => return Ok(()),
                Some(Line::Interrupted) | None => continue,
            };
            if text.trim().is_empty() {
                continue;
            }
            let command = text.strip_prefix('/').filter(|_| !text.contains('\n'));
            let next = match command {
                Some(command) => self.command(command),
                None => self.say(text.trim()).map(|()| Next::Go),
            };
            match next {
                Ok(Next::Go) => {}
                Ok(Next::Leave) => return Ok(()),
                Err(e @ Failure::Output(_)) => return Err(e),
                Err(e) => self.note(&format!("error: {}", one_line(&e)))?,
            }
        }
    }

    fn greet(&mut self) -> Result<()> {
        if let Some(name) = &self.engine.voice.name {
            let line = format!("adapter: {name}");
            self.note(&line)?;
        }
        self.note(&format!("{}, {} tokens of context; /help lists the commands", self.model, self.engine.context()))
    }

    fn command(&mut self, command: &str) -> Result<Next> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "exit" | "quit" | "bye" => return Ok(Next::Leave),
            "help" | "?" => self.note(HELP)?,
            "reset" | "clear" => self.reset()?,
            "system" => self.set_system(rest)?,
            "retry" => self.retry()?,
            "save" => self.save(rest)?,
            "lora" => self.lora(rest)?,
            _ => self.note(&format!("no command /{name}: /help lists them; begin with a space to say it"))?,
        }
        Ok(Next::Go)
    }

    fn reset(&mut self) -> Result<()> {
        self.turns.clear();
        self.engine.forget();
        self.warned = false;
        self.note("the conversation is forgotten")
    }

    fn set_system(&mut self, text: &str) -> Result<()> {
        match text {
            "" => match self.system.clone() {
                Some(system) => self.note(&format!("system: {system}")),
                None => self.note("no system turn"),
            },
            "off" => {
                self.system = None;
                self.note("no system turn from here on")
            }
            text => {
                self.system = Some(text.to_owned());
                self.note("the system turn is set")
            }
        }
    }

    fn retry(&mut self) -> Result<()> {
        if self.turns.last().is_some_and(|turn| turn.role() == "assistant") {
            self.turns.pop();
        }
        match self.turns.last() {
            Some(_) => self.answer(),
            None => self.note("nothing to answer again"),
        }
    }

    fn lora(&mut self, path: &str) -> Result<()> {
        if path.is_empty() {
            let now = self.engine.voice.name.as_deref().unwrap_or("off");
            let given =
                if self.adapters.is_empty() { String::new() } else { format!("; given: {}", self.adapters.join(", ")) };
            return self.note(&format!("adapter: {now}{given}"));
        }
        let path = Some(path).filter(|&path| path != "off");
        let voice = (self.open_voice)(path.map(Path::new))?;
        self.engine.switch(voice)?;
        self.note(&format!("adapter: {}; the conversation goes on", path.unwrap_or("off")))
    }

    /// Appends the conversation as a row of messages.
    fn save(&mut self, file: &str) -> Result<()> {
        let answered = self.turns.iter().any(|turn| turn.role() == "assistant");
        if file.is_empty() || !answered {
            return self.note(if answered { "give a file: /save FILE" } else { "there is no answer to save" });
        }
        let messages = self.conversation().messages;
        let messages: Vec<Value> = messages.iter().map(|turn| Value::Object(turn.object().clone())).collect();
        let row = json!({ "messages": messages });
        let path = Path::new(file);
        let append = || {
            let mut file = OpenOptions::new().append(true).create(true).open(path)?;
            file.write_all(format!("{row}\n").as_bytes())?;
            file.sync_all()
        };
        append().map_err(FileError::io("write", path))?;
        self.note(&format!("a row of {} messages is at the end of {file}", messages.len()))
    }

    fn conversation(&self) -> Conversation {
        let system = self.system.iter().map(|text| Message::new("system", text));
        Conversation { messages: system.chain(self.turns.iter().cloned()).collect(), tools: None }
    }

    /// Adds a turn and answers it; where that fails the turn is as if not said.
    fn say(&mut self, text: &str) -> Result<()> {
        self.turns.push(Message::new("user", text));
        self.answer()
    }

    fn answer(&mut self) -> Result<()> {
        let answered = self.stream_answer();
        let answer = match answered {
            Ok(answer) => answer,
            Err(e) => {
                self.turns.pop();
                return match e {
                    Failure::Model(ModelError::Context { prompt, context }) => self.note(&format!(
                        "the conversation would have {prompt} tokens, the model's context {context}: /reset begins a new one"
                    )),
                    e => Err(e),
                };
            }
        };
        let mut turn = Message::new("assistant", answer.text.as_str());
        if let Some(reasoning) = &answer.reasoning {
            turn.set("reasoning_content", reasoning.as_str());
        }
        self.turns.push(turn);
        self.answers += 1;
        self.after(&answer)
    }

    fn stream_answer(&mut self) -> Result<Answer> {
        let prompt = self.engine.voice.prepare_conversation(&self.conversation())?;
        let params =
            SamplingParams { seed: self.engine.params.seed.wrapping_add(self.answers), ..self.engine.params.clone() };
        self.engine.interrupt.clear();
        let (out, show_thinking) = (&mut *self.out, self.show_thinking);
        let answer = self.engine.answer(&prompt, &params, &mut |piece| show(out, piece, show_thinking))?;
        writeln!(self.out)?;
        self.out.flush()?;
        Ok(answer)
    }

    /// What there is to say about an answer: its speed, how it ended, how full the context is.
    fn after(&mut self, answer: &Answer) -> Result<()> {
        let made = &answer.generation;
        let rate = made.tokens.len() as f64 / made.decode_seconds.max(1e-9);
        let read = answer.prompt_tokens - made.kept;
        let mut line = format!("{} tokens, {rate:.1} tok/s; {read} read", made.tokens.len());
        if made.kept > 0 {
            line.push_str(&format!(", {} known", made.kept));
        }
        line.push_str(&format!(" in {:.2} s", made.prompt_seconds));
        let context = self.engine.context();
        match answer.finish {
            Finish::Stop => {}
            Finish::Length => line.push_str("; cut at --max-tokens"),
            Finish::Context => line.push_str(&format!("; the context of {context} tokens is full: /reset")),
            Finish::Interrupted => line.push_str("; stopped"),
        }
        self.note(&line)?;
        let held = self.engine.held();
        if !self.warned && answer.finish != Finish::Context && held * 5 >= context * 4 {
            self.warned = true;
            self.note(&format!("{held} of the context's {context} tokens are used; /reset begins anew"))?;
        }
        Ok(())
    }

    fn note(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            writeln!(self.notes, "{}", Style::stderr().dim(line))?;
        }
        Ok(self.notes.flush()?)
    }
}

/// What templates and libraries say may have several lines.
fn one_line(error: &Failure) -> String {
    let text = error.to_string();
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
