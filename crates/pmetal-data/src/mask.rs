//! Which part of a rendered conversation the assistant says.

use std::{collections::HashSet, ops::Range, str::FromStr};

use minijinja::Value;

use crate::{
    conversation::{Conversation, Message},
    error::{Error, Result},
    template::{ChatTemplate, Prepared, message_value},
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
        let prompted = template.render(&asked, true).unwrap_or_default();
        let plain = template.render(&asked, false).unwrap_or_default();
        let answered = template.render(&answered, false).unwrap_or_default();
        let header = prompted.get(common_prefix(&prompted, &plain)..).map(str::to_string);
        let (before, after) = answered.rsplit_once(PROBES[0]).unwrap_or_default();
        let end_of_turn = starting_special(after.trim_start(), tokenizer.special_set()).map(str::to_string);
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
    /// begins, because the template treats the last turn in its own way, its content is found by putting others in its place.
    pub(crate) fn spans(&self, train_on: TrainOn) -> Result<Vec<Range<usize>>> {
        let messages = self.conversation.messages.iter().enumerate();
        let spoken = |m: &Message| m.role() == "assistant" && m.trained();
        let turns: Vec<usize> = messages.filter(|(_, m)| spoken(m)).map(|(index, _)| index).collect();
        let Some(&last) = turns.last() else { return Ok(Vec::new()) };
        match (train_on, self.template.render_marked(self.prepared, self.text)?) {
            (TrainOn::Last, None) => Ok(vec![self.turn(last, 0)?]),
            (TrainOn::Last, Some(marked)) => {
                let start = self.turn(last, 0)?.start;
                Ok(marked.into_iter().filter(|span| span.end > start).collect())
            }
            (_, Some(marked)) => Ok(marked),
            (_, None) => self.each_turn(&turns),
        }
    }

    /// The turns the text shows: a template may leave one out. When it shows none, the error is that of the first.
    fn each_turn(&self, turns: &[usize]) -> Result<Vec<Range<usize>>> {
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        let mut lost = None;
        for &turn in turns {
            match self.turn(turn, spans.last().map_or(0, |span| span.end)) {
                Ok(span) => spans.push(span),
                Err(error) => lost = lost.or(Some(error)),
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
            (start, _) => self.by_content(turn, floor, start)?,
        };
        Ok(start..self.trim_to_end_of_turn(start, end))
    }

    /// The turn around its content: where two renderings of the whole, with other contents in its place, differ.
    fn by_content(&self, turn: usize, floor: usize, start: Option<usize>) -> Result<(usize, usize)> {
        let lost = || Error::TurnNotFound { template: self.template.origin().to_string(), message: turn };
        let message = self
            .conversation
            .messages
            .get(turn)
            .filter(|m| m.object().get("content").is_some_and(serde_json::Value::is_string))
            .ok_or_else(lost)?;
        let swapped = |probe: &str, end: usize| {
            let mut message = message.clone();
            message.set("content", probe);
            let others = self.prepared.messages().iter().take(end).enumerate();
            let messages: Vec<Value> =
                others.map(|(i, m)| if i == turn { message_value(&message) } else { m.clone() }).collect();
            self.template.render_messages(self.prepared, &messages, false)
        };
        let all = self.conversation.messages.len();
        let [one, other] = [swapped(PROBES[0], all)?, swapped(PROBES[1], all)?];
        let shared_start = one.get(..common_prefix(&one, &other)).unwrap_or_default();
        let shared_end = one.get(one.len() - common_suffix(&one, &other)..).unwrap_or_default();
        let content_start = common_prefix(self.text, shared_start);
        let content_end = self.text.len() - common_suffix(self.text, shared_end);
        if one == other || content_start < floor || content_end < content_start {
            return Err(lost());
        }
        let header = || {
            let header = self.shape.header.as_deref()?;
            let found = self.text.get(floor..content_start)?.rfind(header)?;
            Some(floor + found + header.len())
        };
        let lead =
            || self.text.get(floor..content_start)?.strip_suffix(&self.shape.lead).map(|rest| floor + rest.len());
        let start =
            start.filter(|&start| start <= content_start).or_else(header).or_else(lead).unwrap_or(content_start);
        let alone = swapped(PROBES[0], turn + 1)?;
        let tail = alone.rfind(PROBES[0]).and_then(|at| alone.get(at + PROBES[0].len()..)).unwrap_or_default();
        Ok((start, content_end + self.tail_length(content_end, tail)))
    }

    /// Bytes after a turn's content that still belong to it, given the tail it has as the last turn.
    fn tail_length(&self, content_end: usize, tail: &str) -> usize {
        let rest = self.text.get(content_end..).unwrap_or_default();
        let after_space = rest.trim_start();
        match starting_special(after_space, self.tokenizer.special_set()) {
            Some(special) => rest.len() - after_space.len() + special.len(),
            None if rest.starts_with(tail.trim_end()) => tail.trim_end().len(),
            None => 0,
        }
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
        self.tokenizer.token_to_id(special).is_some_and(|id| self.tokenizer.eos_ids().contains(&id))
    }
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
