//! Which part of a rendered conversation the assistant says.

use std::{collections::HashSet, ops::Range, str::FromStr};

use minijinja::Value;
use serde_json::{Value as Json, json};

use crate::{
    conversation::{Conversation, Message},
    error::{Error, Result},
    template::{ChatTemplate, Prepared},
    tokenizer::Tokenizer,
};

/// Which tokens of a conversation are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainOn {
    /// What the assistant says in every turn, the end of the turn included.
    #[default]
    Assistant,
    /// The same of its last turn only.
    Last,
    /// Everything.
    All,
}

impl FromStr for TrainOn {
    type Err = Error;

    /// Reads `assistant`, `last` or `all`.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "assistant" => Ok(Self::Assistant),
            "last" => Ok(Self::Last),
            "all" => Ok(Self::All),
            other => Err(Error::UnknownTrainOn { name: other.to_string() }),
        }
    }
}

/// Contents no template treats in a special way, with no common start or end.
const PROBES: [&str; 2] = ["Kestrel flew", "Wagon stood up"];

/// How a template writes an assistant's turn, learnt once by rendering probes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct TurnShape {
    /// The end of the text before an assistant's first word, as `<|im_start|>assistant\n`.
    header: Option<String>,
    /// What the assistant says before the content in every turn: Mistral's space.
    lead: String,
    /// The special token after the assistant's last word, as `<|im_end|>`.
    pub(crate) end_of_turn: Option<String>,
}

impl TurnShape {
    /// Renders probes. A template that refuses them teaches nothing, and conversations have to do without.
    pub(crate) fn learn(template: &ChatTemplate, tokenizer: &Tokenizer) -> Self {
        let question = Message::new("user", PROBES[1]);
        let asked = Conversation { messages: vec![question.clone()], tools: None };
        let answer = Message::new("assistant", PROBES[0]);
        let answered = Conversation { messages: vec![question, answer], tools: None };
        // A template that runs away is not asked twice.
        let Ok(prompted) = template.render(&asked, true) else { return Self::default() };
        let plain = template.render(&asked, false).unwrap_or_default();
        let answered = template.render(&answered, false).unwrap_or_default();
        let header = prompted.get(common_prefix(&prompted, &plain)..).map(str::to_string);
        let (before, after) = answered.rsplit_once(PROBES[0]).unwrap_or_default();
        let end_of_turn = ending_of_turn(after.trim_start(), tokenizer).map(str::to_string);
        let lead = before.strip_prefix(&prompted).unwrap_or_default().to_string();
        Self { header: header.filter(|text| !text.trim().is_empty()), lead, end_of_turn }
    }
}

/// Finds the assistant's turns in one rendered conversation.
pub(crate) struct Turns<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) shape: &'a TurnShape,
    pub(crate) conversation: &'a Conversation,
    pub(crate) prepared: &'a Prepared,
    /// The whole conversation, rendered.
    pub(crate) text: &'a str,
}

impl Turns<'_> {
    /// The spans of the text (in bytes, in order) that are trained; [`TrainOn::All`] needs none and is taken as `Assistant`.
    ///
    /// `{% generation %}` tags say it where a template has them. Elsewhere a turn is what is between the rendering of all that
    /// came before it, with a generation prompt, and the rendering up to and with it; where those are not how the whole
    /// begins, because the template treats the last turn in its own way, what it says is found by putting other words in
    /// its place. So a turn is what the model generates: reasoning, content, calls of tools and the token that ends it, but
    /// not the header, nor a mark of reasoning that the generation prompt already opened.
    pub(crate) fn spans(&self, train_on: TrainOn) -> Result<Vec<Range<usize>>> {
        let spoken = |trained: bool| {
            let messages = self.conversation.messages.iter().enumerate();
            messages.filter(move |(_, m)| m.role() == "assistant" && (m.trained() || !trained)).map(|(turn, _)| turn)
        };
        let mut wanted: Vec<usize> = spoken(true).collect();
        if train_on == TrainOn::Last {
            wanted.drain(..wanted.len().saturating_sub(1));
        }
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let marked = self.template.render_marked(self.prepared, self.text)?;
        match marked {
            Some(marked) if wanted.len() == spoken(false).count() => Ok(marked),
            None => self.each_turn(spoken(false), &wanted),
            Some(marked) => {
                let turns = self.each_turn(spoken(false), &wanted)?;
                let meets = |span: &Range<usize>| {
                    turns.iter().any(|t| span.start < t.end && t.start < span.end.max(span.start + 1))
                };
                Ok(marked.into_iter().filter(meets).collect())
            }
        }
    }

    /// The wanted of the turns, where the text shows them: a template may leave one out. When it shows none, the error is
    /// that of the first.
    fn each_turn(&self, turns: impl Iterator<Item = usize>, wanted: &[usize]) -> Result<Vec<Range<usize>>> {
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(wanted.len());
        let (mut lost, mut floor) = (None, 0);
        for turn in turns {
            match self.turn(turn, floor) {
                Ok(span) => {
                    floor = span.end;
                    if wanted.contains(&turn) {
                        spans.push(span);
                    }
                }
                Err(error) if wanted.contains(&turn) => lost = lost.or(Some(error)),
                Err(_) => {}
            }
        }
        match lost {
            Some(error) if spans.is_empty() => Err(error),
            _ => Ok(spans),
        }
    }

    /// One turn, which begins at `floor` or later.
    fn turn(&self, turn: usize, floor: usize) -> Result<Range<usize>> {
        let prefix = |messages: usize, prompt| {
            let messages = self.prepared.messages().get(..messages)?;
            let text = self.template.render_messages(self.prepared, messages, prompt).ok()?;
            (self.text.starts_with(&text) && text.len() >= floor).then_some(text.len())
        };
        let (start, end) = match (prefix(turn, true), prefix(turn + 1, false)) {
            (Some(start), Some(end)) if start < end => (start, end),
            (start, _) => self.by_words(turn, floor, start)?,
        };
        Ok(start..self.trim_to_end_of_turn(start, end))
    }

    /// The turn around its words: where two renderings of the whole, with other words in its place, differ.
    fn by_words(&self, turn: usize, floor: usize, start: Option<usize>) -> Result<(usize, usize)> {
        let lost = || Error::TurnNotFound { template: self.template.origin().to_string(), message: turn };
        let message = self.conversation.messages.get(turn).ok_or_else(lost)?;
        let swapped = |probe: &str, end: usize| {
            let message = self.prepared.value(&with_words(message, probe));
            let others = self.prepared.messages().iter().take(end).enumerate();
            let messages: Vec<Value> =
                others.map(|(i, m)| if i == turn { message.clone() } else { m.clone() }).collect();
            self.template.render_messages(self.prepared, &messages, false)
        };
        let all = self.conversation.messages.len();
        let [one, other] = [swapped(PROBES[0], all)?, swapped(PROBES[1], all)?];
        let shared_start = one.get(..common_prefix(&one, &other)).unwrap_or_default();
        let shared_end = one.get(one.len() - common_suffix(&one, &other)..).unwrap_or_default();
        let words_start = common_prefix(self.text, shared_start);
        let words_end = self.text.len() - common_suffix(self.text, shared_end);
        if one == other || words_start < floor || words_end < words_start {
            return Err(lost());
        }
        let alone = swapped(PROBES[0], turn + 1)?;
        let before = self.text.get(floor..words_start).unwrap_or_default();
        // What the turn begins with where it is the last, as the mark and the name of a call, is what it begins with here.
        let own = || {
            let asked = self.prepared.messages().get(..turn)?;
            let asked = self.template.render_messages(self.prepared, asked, true).ok()?;
            let own = alone.strip_prefix(&asked).or_else(|| {
                // A template may write the last question in its own way, and end it as any other.
                let mark = ending_special(&asked, self.tokenizer.special_set())?;
                let said = alone.find(PROBES[0])?;
                alone.get(alone.get(..said)?.rfind(mark)? + mark.len()..)
            })?;
            let own = own.get(..own.find(PROBES[0])?).filter(|own| !own.is_empty())?;
            let start = shared_start.strip_suffix(own)?.len();
            (floor..=words_start).contains(&start).then_some(start)
        };
        let lead = || before.strip_suffix(&self.shape.lead).map(|rest| floor + rest.len());
        let header = || self.after_header(before).map(|at| floor + at);
        let start = start
            .filter(|&start| start <= words_start)
            .or_else(own)
            .or_else(header)
            .or_else(lead)
            .unwrap_or(words_start);
        let tail = alone.rfind(PROBES[0]).and_then(|at| alone.get(at + PROBES[0].len()..)).unwrap_or_default();
        // The tail is that of the words put in place, of which the text has what follows its own.
        let behind = self.text.len().saturating_sub(shared_end.len());
        let end = (behind + self.shared_tail(shared_end, tail)).max(words_end);
        Ok((start, end + self.end_at(end, tail)))
    }

    /// Where the last header of an assistant's turn ends. A generation prompt may open the reasoning, which turns of the past
    /// do not have: its beginning is a header, too.
    fn after_header(&self, before: &str) -> Option<usize> {
        let header = self.shape.header.as_deref()?;
        let special = self.tokenizer.special_set();
        let mut ends = vec![header.len()];
        for (at, c) in header.char_indices().rev() {
            let named = starting_special(header.get(at..).unwrap_or_default(), special).map(|token| at + token.len());
            ends.extend(named.into_iter().chain((c == '\n').then_some(at + 1)));
        }
        ends.sort_unstable_by(|a, b| b.cmp(a));
        let words = |text: &str| starting_special(text, special).is_none_or(|token| token.len() < text.len());
        let starts = ends.into_iter().filter_map(|end| header.get(..end));
        let mut starts = starts.filter(|start| start.len() == header.len() || words(start));
        starts.find_map(|start| Some(before.rfind(start)? + start.len()))
    }

    /// Bytes with which both begin, with no special token in pieces.
    fn shared_tail(&self, text: &str, tail: &str) -> usize {
        let tail = tail.trim_end();
        let shared = common_prefix(text, tail);
        let whole = |at: usize| {
            let special = starting_special(tail.get(at..)?, self.tokenizer.special_set())?;
            (at < shared && shared < at + special.len()).then_some(at)
        };
        (0..shared).find_map(whole).unwrap_or(shared)
    }

    /// Bytes from `end` on that end the turn, where its tail as the last turn ends it otherwise or not yet.
    fn end_at(&self, end: usize, tail: &str) -> usize {
        let rest = self.text.get(end..).unwrap_or_default();
        let after_space = rest.trim_start();
        let ends = |special: &str| self.shape.end_of_turn.as_deref() == Some(special) || self.ends_text(special);
        let done = ending_special(self.text.get(..end).unwrap_or_default(), self.tokenizer.special_set());
        match starting_special(after_space, self.tokenizer.special_set()) {
            Some(special) if !done.is_some_and(ends) && (ends(special) || self.closes(tail)) => {
                rest.len() - after_space.len() + special.len()
            }
            _ => 0,
        }
    }

    /// Whether the tail of a last turn is, or begins with, a special token.
    fn closes(&self, tail: &str) -> bool {
        starting_special(tail.trim_start(), self.tokenizer.special_set()).is_some()
    }

    /// Cuts what follows the token that ends the turn: a line break, or what a template writes behind the last turn. A span
    /// that ends in plain text stays.
    fn trim_to_end_of_turn(&self, start: usize, end: usize) -> usize {
        let mut rest = self.text.get(start..end).unwrap_or_default().trim_end();
        let mut last = None;
        let mut first_end = None;
        while let Some(special) = ending_special(rest, self.tokenizer.special_set()) {
            let at = start + rest.len();
            last = last.or(Some(at));
            if self.shape.end_of_turn.as_deref() == Some(special) || self.ends_text(special) {
                first_end = Some(at);
            }
            rest = rest.strip_suffix(special).unwrap_or_default().trim_end();
        }
        first_end.or(last).unwrap_or(end)
    }

    fn ends_text(&self, special: &str) -> bool {
        ends_text(self.tokenizer, special)
    }
}

/// The message with other words: its text, its reasoning and the arguments of its calls. The names of tools stay, since a
/// template may write them again with the result.
fn with_words(message: &Message, words: &str) -> Message {
    let mut changed = message.clone();
    let mut said = false;
    for key in ["reasoning_content", "reasoning", "thinking"] {
        if message.object().get(key).and_then(Json::as_str).is_some_and(|text| !text.is_empty()) {
            changed.set(key, words);
            said = true;
        }
    }
    if let Some(Json::Array(calls)) = message.object().get("tool_calls")
        && !calls.is_empty()
    {
        let mut calls = calls.clone();
        for call in &mut calls {
            let Some(Json::Object(function)) = call.get_mut("function") else { continue };
            let other = json!({ "word": words });
            let text = function.get("arguments").is_some_and(Json::is_string);
            function.insert("arguments".to_string(), if text { other.to_string().into() } else { other });
            said = true;
        }
        changed.set("tool_calls", calls);
    }
    match message.object().get("content") {
        Some(Json::Array(parts)) if !parts.is_empty() => {
            let mut parts = parts.clone();
            for part in parts.iter_mut().filter_map(Json::as_object_mut) {
                for key in ["text", "thinking", "reasoning"] {
                    if let Some(value) = part.get_mut(key) {
                        *value = words.into();
                    }
                }
            }
            changed.set("content", parts);
        }
        Some(Json::String(text)) if !said || !text.is_empty() => changed.set("content", words),
        _ if !said => changed.set("content", words),
        _ => {}
    }
    changed
}

fn ends_text(tokenizer: &Tokenizer, special: &str) -> bool {
    tokenizer.token_to_id(special).is_some_and(|id| tokenizer.eos_ids().contains(&id))
}

/// Which of the special tokens that `after` starts with ends a turn: the first that ends text, as the mark behind Command R7B's end of an
/// answer, else the first.
fn ending_of_turn<'a>(after: &'a str, tokenizer: &Tokenizer) -> Option<&'a str> {
    let first = starting_special(after, tokenizer.special_set());
    let mut rest = after;
    while let Some(special) = starting_special(rest, tokenizer.special_set()) {
        if ends_text(tokenizer, special) {
            return Some(special);
        }
        rest = rest.get(special.len()..)?;
    }
    first
}

/// The longest special token `text` starts with.
fn starting_special<'a>(text: &'a str, special: &HashSet<String>) -> Option<&'a str> {
    let longest =
        special.iter().filter(|token| !token.is_empty() && text.starts_with(*token)).map(String::len).max()?;
    text.get(..longest)
}

/// The longest special token `text` ends with.
fn ending_special<'a>(text: &'a str, special: &HashSet<String>) -> Option<&'a str> {
    let longest = special.iter().filter(|token| !token.is_empty() && text.ends_with(*token)).map(String::len).max()?;
    text.get(text.len() - longest..)
}

/// Bytes both texts begin with, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// Bytes both texts end with, in whole characters.
fn common_suffix(a: &str, b: &str) -> usize {
    a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}
