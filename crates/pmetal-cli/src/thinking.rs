//! Tells reasoning from answer, by the tags around it, as the text streams.

use crate::stop::held_back;

/// What stands before reasoning, and what behind it.
pub type Tags = (&'static str, &'static str);

/// The tags models write as plain text. They are looked for in every answer.
pub const THINK: Tags = ("<think>", "</think>");

/// The tags of Magistral: looked for where they are tokens of the model.
pub const BRACKETS: Tags = ("[THINK]", "[/THINK]");

/// A part of what a model says.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// What it thinks.
    Reasoning(String),
    /// What it answers.
    Answer(String),
    /// A tag, or white space between a tag and the answer.
    Mark(String),
}

/// Cuts text into reasoning and answer.
pub struct ThinkSplitter {
    tags: Vec<Tags>,
    /// The tag that ends the reasoning the text is in.
    inside: Option<&'static str>,
    /// White space is a mark until something else comes: at the start of an answer that thought first.
    trimming: bool,
    /// What may be the beginning of a tag.
    held: String,
}

impl ThinkSplitter {
    /// A splitter for an answer to `prompt`, which may itself have opened the reasoning.
    pub fn new(prompt: &str, tags: Vec<Tags>) -> Self {
        let prompt = prompt.trim_end();
        let inside = tags.iter().find(|(open, _)| prompt.ends_with(open)).map(|&(_, close)| close);
        Self { tags, inside, trimming: false, held: String::new() }
    }

    /// Takes a piece of text and returns what of it is certain by now.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        while let Some((at, tag, next)) = self.next_tag() {
            let before: String = self.held.drain(..at).collect();
            self.pass(before, &mut pieces);
            self.held.drain(..tag.len());
            pieces.push(Piece::Mark(tag.to_owned()));
            self.trimming = next.is_none();
            self.inside = next;
        }
        let open = |&(open, _): &Tags| held_back(&self.held, open);
        let uncertain = match self.inside {
            Some(close) => held_back(&self.held, close),
            None => self.tags.iter().map(open).max().unwrap_or(0),
        };
        let certain: String = self.held.drain(..self.held.len() - uncertain).collect();
        self.pass(certain, &mut pieces);
        pieces
    }

    /// What was held back when the text ended.
    pub fn flush(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let rest = std::mem::take(&mut self.held);
        self.pass(rest, &mut pieces);
        pieces
    }

    /// The first tag in what is held: where, which, and what ends the text behind it.
    fn next_tag(&self) -> Option<(usize, &'static str, Option<&'static str>)> {
        match self.inside {
            Some(close) => self.held.find(close).map(|at| (at, close, None)),
            None => {
                let found =
                    self.tags.iter().filter_map(|&(open, close)| Some((self.held.find(open)?, open, Some(close))));
                found.min_by_key(|&(at, ..)| at)
            }
        }
    }

    fn pass(&mut self, text: String, pieces: &mut Vec<Piece>) {
        if self.inside.is_some() {
            pieces.extend((!text.is_empty()).then_some(Piece::Reasoning(text)));
            return;
        }
        let answer = if self.trimming { text.trim_start() } else { &text };
        let space = &text[..text.len() - answer.len()];
        pieces.extend((!space.is_empty()).then(|| Piece::Mark(space.to_owned())));
        if !answer.is_empty() {
            self.trimming = false;
            pieces.push(Piece::Answer(answer.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reasoning, answer and everything, of a text that comes in pieces of so many characters.
    fn split(prompt: &str, text: &str, size: usize) -> [String; 3] {
        let mut splitter = ThinkSplitter::new(prompt, vec![THINK, BRACKETS]);
        let chars: Vec<char> = text.chars().collect();
        let mut pieces: Vec<Piece> =
            chars.chunks(size).flat_map(|c| splitter.push(&c.iter().collect::<String>())).collect();
        pieces.extend(splitter.flush());
        let mut parts = [const { String::new() }; 3];
        for piece in pieces {
            let (part, text) = match &piece {
                Piece::Reasoning(text) => (0, text),
                Piece::Answer(text) => (1, text),
                Piece::Mark(text) => (2, text),
            };
            if part < 2 {
                parts[part].push_str(text);
            }
            parts[2].push_str(text);
        }
        parts
    }

    #[test]
    fn reasoning_is_told_apart_however_the_text_is_cut() {
        for size in 1..9 {
            let cases = [
                ("", "<think>\nhm\n</think>\n\nYes, 1 < 2.", "\nhm\n", "Yes, 1 < 2."),
                ("…<think>\n", "hm</think> Yes", "hm", "Yes"),
                ("…[THINK]", "a [b]</think>[/THINK]Yes é", "a [b]</think>", "Yes é"),
                ("", "a <thin b [THINK <", "", "a <thin b [THINK <"),
                ("", "<think>never closed</thin", "never closed</thin", ""),
                ("", "so [THINK]x[/THINK] <think>y</think> on", "xy", "so on"),
            ];
            for (prompt, text, reasoning, answer) in cases {
                assert_eq!(split(prompt, text, size), [reasoning, answer, text], "in pieces of {size}");
            }
        }
    }
}
