use std::ops::ControlFlow;

use pmetal::{
    data::StreamDecoder,
    lora::{Use, attach_file, detach},
    models::{CausalLMModel, Checkpoint, Event, Generation, Logprobs, SamplingParams, Session, StopReason},
    ops::Weight,
};
use serde_json::{Map, Value, json};

use super::{
    args::Args,
    voice::{Prepared, Voice},
};
use crate::{
    interrupt::Interrupt,
    stop::StopMatcher,
    thinking::{Piece, ThinkSplitter},
    verbs::Result,
};

/// Sees each part of an answer as it comes.
pub type Sink<'a> = &'a mut dyn FnMut(&Piece) -> Result<()>;

/// A model that answers, with one adapter or none at a time.
pub struct Engine {
    model: Box<dyn CausalLMModel>,
    /// The model's own, whatever an adapter brings.
    tables: Tables,
    session: Session,
    pub voice: Voice,
    pub params: SamplingParams,
    stop: Vec<String>,
    pub interrupt: Interrupt,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop text came.
    Stop,
    /// `--max-tokens` are there.
    Length,
    /// The model's context is full.
    Context,
    /// Ctrl-C.
    Interrupted,
}

impl Finish {
    /// As JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Context => "context",
            Self::Interrupted => "interrupted",
        }
    }
}

/// An answer.
pub struct Answer {
    /// Without reasoning.
    pub text: String,
    /// Where there was any.
    pub reasoning: Option<String>,
    pub finish: Finish,
    pub prompt_tokens: usize,
    pub generation: Generation,
    /// One entry per token, where asked for.
    logprobs: Option<Vec<Value>>,
}

impl Answer {
    /// The answer beside what a row had.
    pub fn add_to(&self, fields: &mut Map<String, Value>, voice: &Voice) {
        let mut add = |key: &str, value: Value| fields.insert(key.to_owned(), value);
        add("completion", self.text.as_str().into());
        if let Some(reasoning) = &self.reasoning {
            add("reasoning", reasoning.as_str().into());
        }
        add("finish_reason", self.finish.name().into());
        add("prompt_tokens", self.prompt_tokens.into());
        add("completion_tokens", self.generation.tokens.len().into());
        if let Some(name) = &voice.name {
            add("adapter", name.as_str().into());
        }
        if let Some(logprobs) = &self.logprobs {
            add("logprobs", json!({ "content": logprobs }));
        }
    }
}

/// The embedding and the head of a model: an adapter may bring its own.
struct Tables {
    embedding: Weight,
    /// None where it is the embedding.
    head: Option<Weight>,
}

impl Tables {
    fn of(model: &dyn CausalLMModel) -> Self {
        let head = (!model.spec().tie_word_embeddings).then(|| model.head().clone());
        Self { embedding: model.embedding().clone(), head }
    }

    fn put(&self, model: &mut dyn CausalLMModel) -> Result<()> {
        Ok(model.set_tables(self.embedding.clone(), self.head.clone())?)
    }
}

impl Engine {
    /// Loads the weights of a checkpoint, with the adapter of a voice.
    pub fn load(args: &Args, checkpoint: &Checkpoint, voice: Voice, params: SamplingParams) -> Result<Self> {
        let mut model = args.model.load(checkpoint)?;
        let tables = Tables::of(model.as_ref());
        if let Some(adapter) = &voice.adapter {
            attach_file(model.as_mut(), adapter, Use::Inference)?;
        }
        let session = Session::new(model.as_ref())?;
        Ok(Self { model, tables, session, voice, params, stop: args.stop.clone(), interrupt: Interrupt::default() })
    }

    /// Goes on with another adapter, or without one. One that does not fit changes nothing.
    pub fn switch(&mut self, voice: Voice) -> Result<()> {
        let held = Tables::of(self.model.as_ref());
        self.tables.put(self.model.as_mut())?;
        match &voice.adapter {
            Some(adapter) => {
                if let Err(error) = attach_file(self.model.as_mut(), adapter, Use::Inference) {
                    held.put(self.model.as_mut())?;
                    return Err(error.into());
                }
            }
            None => detach(self.model.as_mut())?,
        }
        self.session.clear();
        self.voice = voice;
        Ok(())
    }

    /// Forgets what was read.
    pub fn forget(&mut self) {
        self.session.clear();
    }

    /// Tokens that the model's context holds.
    pub fn context(&self) -> usize {
        self.model.spec().max_position_embeddings
    }

    /// Tokens of the context that are in use.
    pub fn held(&self) -> usize {
        self.session.held()
    }

    /// Answers a prompt; `sink` sees the answer as it comes.
    pub fn answer(&mut self, prompt: &Prepared, params: &SamplingParams, sink: Sink) -> Result<Answer> {
        let mut writer = Writer::new(&self.voice, prompt, &self.stop, sink);
        let (mut stopped, mut failure) = (false, None);
        let interrupt = self.interrupt.clone();
        let mut on_event = |event| {
            if let Event::Token { id, logprobs } = event {
                match writer.token(id, logprobs) {
                    Ok(stop) => stopped |= stop,
                    Err(e) => failure = Some(e),
                }
            }
            let enough = stopped || failure.is_some() || interrupt.is_set();
            if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let model = self.model.as_ref();
        let generation = self.session.generate(model, &prompt.ids, params, &prompt.stop_ids, &mut on_event)?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        let finish = match generation.stop {
            StopReason::Eos => Finish::Stop,
            StopReason::Length => Finish::Length,
            StopReason::Context => Finish::Context,
            StopReason::Caller if stopped => Finish::Stop,
            StopReason::Caller => Finish::Interrupted,
        };
        // what a stop text held back stays unsaid; what waits for more may yet be one
        let stopped = stopped || writer.finish()?;
        let finish = if stopped { Finish::Stop } else { finish };
        let logprobs = params.logprobs.map(|_| writer.logprobs);
        let reasoning = Some(writer.reasoning.trim().to_owned()).filter(|text| !text.is_empty());
        let prompt_tokens = prompt.ids.len();
        Ok(Answer { text: writer.answer, reasoning, finish, prompt_tokens, generation, logprobs })
    }
}

/// Makes text of tokens, and sorts it.
struct Writer<'a> {
    voice: &'a Voice,
    sink: Sink<'a>,
    stream: StreamDecoder<'a>,
    splitter: ThinkSplitter,
    stop: StopMatcher,
    before: Option<u32>,
    answer: String,
    reasoning: String,
    logprobs: Vec<Value>,
}

impl<'a> Writer<'a> {
    fn new(voice: &'a Voice, prompt: &Prepared, stop: &[String], sink: Sink<'a>) -> Self {
        let stops = prompt.stop_texts.iter().chain(stop).cloned().collect();
        Self {
            voice,
            sink,
            stream: voice.tokenizer.stream(),
            splitter: ThinkSplitter::new(&prompt.text, voice.tags.clone()),
            stop: StopMatcher::new(stops),
            before: prompt.ids.last().copied(),
            answer: String::new(),
            reasoning: String::new(),
            logprobs: Vec::new(),
        }
    }

    /// Takes a token; true where a stop text is complete.
    fn token(&mut self, id: u32, logprobs: Option<Logprobs>) -> Result<bool> {
        if let Some(logprobs) = logprobs {
            let entry = self.logprob(id, &logprobs)?;
            self.logprobs.push(entry);
        }
        self.before = Some(id);
        match self.voice.tag_ids.get(&id) {
            Some(tag) => {
                let stream = std::mem::replace(&mut self.stream, self.voice.tokenizer.stream());
                let waiting = stream.finish()?;
                Ok(self.text(&waiting)? || self.text(tag)?)
            }
            None => {
                let text = self.stream.push(id)?;
                self.text(&text)
            }
        }
    }

    fn text(&mut self, text: &str) -> Result<bool> {
        let pieces = self.splitter.push(text);
        self.pieces(pieces)
    }

    fn pieces(&mut self, pieces: Vec<Piece>) -> Result<bool> {
        for piece in pieces {
            match piece {
                Piece::Answer(text) => {
                    let (shown, stopped) = self.stop.push(&text);
                    self.say(shown)?;
                    if stopped {
                        return Ok(true);
                    }
                }
                other => {
                    let waiting = self.stop.flush();
                    self.say(waiting)?;
                    (self.sink)(&other)?;
                    if let Piece::Reasoning(text) = other {
                        self.reasoning.push_str(&text);
                    }
                }
            }
        }
        Ok(false)
    }

    fn say(&mut self, text: String) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.answer.push_str(&text);
        (self.sink)(&Piece::Answer(text))
    }

    /// What still waits when no more tokens come; true where that completes a stop text.
    fn finish(&mut self) -> Result<bool> {
        let stream = std::mem::replace(&mut self.stream, self.voice.tokenizer.stream());
        let waiting = stream.finish()?;
        if self.text(&waiting)? {
            return Ok(true);
        }
        let rest = self.splitter.flush();
        if self.pieces(rest)? {
            return Ok(true);
        }
        let waiting = self.stop.flush();
        self.say(waiting)?;
        Ok(false)
    }

    /// A token as OpenAI's interface writes it, with its id.
    fn logprob(&self, id: u32, logprobs: &Logprobs) -> Result<Value> {
        let text = |id| self.voice.token_text(self.before, id);
        let top = |&(id, logprob): &(u32, f64)| Ok(json!({ "token": text(id)?, "id": id, "logprob": logprob }));
        let top = logprobs.top.iter().map(top).collect::<Result<Vec<_>>>()?;
        Ok(json!({ "token": text(id)?, "id": id, "logprob": logprobs.logprob, "top_logprobs": top }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::verbs::infer::testing::{args, base, open_voice};

    /// What comes of tokens: each piece seen, then reasoning, answer, and whether a stop text ended it.
    fn written(voice: &Voice, prompt: &str, ids: &[u32], stop: &[&str]) -> (Vec<Piece>, String, String, bool) {
        let prompt = voice.continue_text(prompt, "").unwrap();
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut pieces = Vec::new();
        let mut sink = |piece: &Piece| {
            pieces.push(piece.clone());
            Ok(())
        };
        let mut writer = Writer::new(voice, &prompt, &stop, &mut sink);
        let stopped = ids.iter().any(|&id| writer.token(id, None).unwrap()) || writer.finish().unwrap();
        let (answer, reasoning) = (writer.answer, writer.reasoning);
        (pieces, reasoning, answer, stopped)
    }

    #[test]
    fn reasoning_and_stop_texts_across_tokens() {
        let voice = open_voice(&args(&base(), &[]));
        let ids = |text: &str| voice.tokenizer.encode(text, false).unwrap();
        let thought = ids("<think>hm END</think>\n\nYes. The END is near €");
        assert!(thought.len() > 12, "the tags and the stop text are several tokens");
        let (_, reasoning, answer, stopped) = written(&voice, "x", &thought, &[]);
        assert_eq!((reasoning.as_str(), answer.as_str(), stopped), ("hm END", "Yes. The END is near €", false));
        let (pieces, reasoning, answer, stopped) = written(&voice, "x", &thought, &["END"]);
        assert_eq!((reasoning.as_str(), answer.as_str(), stopped), ("hm END", "Yes. The ", true));
        let said = |piece: &Piece| matches!(piece, Piece::Answer(text) if text.contains('E'));
        assert!(!pieces.iter().any(said), "{pieces:?}");
        let (.., answer, stopped) = written(&voice, "x", &thought, &["near € or far"]);
        assert_eq!((answer.as_str(), stopped), ("Yes. The END is near €", false));
        let (_, reasoning, answer, _) = written(&voice, "so <think>", &ids("hm</think>Yes"), &[]);
        assert_eq!((reasoning.as_str(), answer.as_str()), ("hm", "Yes"));
    }

    #[test]
    fn tags_that_are_special_tokens_are_seen_though_decoding_leaves_them_out() {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(base()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let file = folder.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let tokens = json["added_tokens"].as_array_mut().unwrap();
        for (id, tag) in [(1536, "[THINK]"), (1537, "[/THINK]")] {
            let mut token = tokens[0].clone();
            token["id"] = id.into();
            token["content"] = tag.into();
            tokens.push(token);
        }
        fs::write(&file, json.to_string()).unwrap();
        let voice = open_voice(&args(folder.path().to_str().unwrap(), &[]));
        let ids = voice.tokenizer.encode("[THINK]a thought[/THINK] Yes", false).unwrap();
        assert!(ids.contains(&1536) && ids.contains(&1537));
        let (_, reasoning, answer, _) = written(&voice, "x", &ids, &[]);
        assert_eq!((reasoning.as_str(), answer.as_str()), ("a thought", "Yes"));
    }

    #[test]
    fn the_texts_of_tokens_add_up() {
        let voice = open_voice(&args(&base(), &[]));
        let text = "Mara gets three red kites.";
        let ids = voice.tokenizer.encode(text, false).unwrap();
        let mut before = voice.tokenizer.encode("x", false).unwrap().last().copied();
        let mut parts = String::new();
        for id in ids {
            parts.push_str(&voice.token_text(before, id).unwrap());
            before = Some(id);
        }
        assert_eq!(parts, text);
        let end = voice.tokenizer.eos_id().unwrap();
        assert_eq!(voice.token_text(None, end).unwrap(), voice.tokenizer.token(end).unwrap());
    }
}
