//! What a person types: lines, and inputs of one or several of them.

use std::io;

use rustyline::{Config, DefaultEditor, error::ReadlineError};

use crate::verbs::{Failure, Result};

/// Between two of these lines everything is one input.
const FENCE: &str = "\"\"\"";

/// What came of waiting for a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D.
    End,
}

/// Where lines come from.
pub trait Lines {
    /// The next line, asked for with `prompt`.
    fn read(&mut self, prompt: &str) -> Result<Line>;
}

/// Reads one input: a line, several that end in `\`, or those between two `"""`.
///
/// `None` where Ctrl-C dropped what was typed; the line [`Line::End`] where there is no more.
pub fn read_input(lines: &mut dyn Lines, prompt: &str, more: &str) -> Result<Option<Line>> {
    let first = match lines.read(prompt)? {
        Line::Text(text) => text,
        Line::Interrupted => return Ok(None),
        Line::End => return Ok(Some(Line::End)),
    };
    let fenced = first.trim_start().strip_prefix(FENCE).map(str::to_owned);
    let mut text = match &fenced {
        Some(rest) => match rest.trim_end().strip_suffix(FENCE) {
            Some(whole) => return Ok(Some(Line::Text(whole.to_owned()))),
            None => rest.clone(),
        },
        None => first,
    };
    loop {
        if fenced.is_none() {
            match text.strip_suffix('\\') {
                Some(begun) => text.truncate(begun.len()),
                None => return Ok(Some(Line::Text(text))),
            }
        }
        let next = match lines.read(more)? {
            Line::Text(next) => next,
            Line::Interrupted => return Ok(None),
            Line::End => return Ok(Some(Line::End)),
        };
        // nothing behind the first fence is no empty line
        if fenced.is_none() || !text.is_empty() {
            text.push('\n');
        }
        match next.trim_end().strip_suffix(FENCE).filter(|_| fenced.is_some()) {
            Some(rest) => {
                text.push_str(rest);
                return Ok(Some(Line::Text(text.trim_end_matches('\n').to_owned())));
            }
            None => text.push_str(&next),
        }
    }
}

/// The person at the terminal: lines can be edited, and earlier ones of this chat come back with the arrow keys. Nothing is kept on disk.
pub struct Terminal {
    editor: DefaultEditor,
}

impl Terminal {
    /// The terminal of the command.
    pub fn new() -> Result<Self> {
        let config = Config::builder().auto_add_history(true).build();
        Ok(Self { editor: DefaultEditor::with_config(config).map_err(failed)? })
    }
}

impl Lines for Terminal {
    fn read(&mut self, prompt: &str) -> Result<Line> {
        match self.editor.readline(prompt) {
            Ok(text) => Ok(Line::Text(text)),
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(e) => Err(failed(e)),
        }
    }
}

fn failed(error: ReadlineError) -> Failure {
    Failure::Output(io::Error::other(format!("the terminal cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Typed<'a>(std::slice::Iter<'a, &'a str>);

    impl Lines for Typed<'_> {
        fn read(&mut self, _: &str) -> Result<Line> {
            Ok(match self.0.next() {
                None => Line::End,
                Some(&"^C") => Line::Interrupted,
                Some(text) => Line::Text((*text).to_owned()),
            })
        }
    }

    fn inputs(lines: &[&str]) -> Vec<String> {
        let mut typed = Typed(lines.iter());
        let mut inputs = Vec::new();
        loop {
            match read_input(&mut typed, "", "").unwrap() {
                Some(Line::Text(text)) => inputs.push(text),
                Some(_) => return inputs,
                None => inputs.push("dropped".into()),
            }
        }
    }

    #[test]
    fn lines_that_belong_together() {
        assert_eq!(inputs(&["one", "two"]), ["one", "two"]);
        assert_eq!(inputs(&["one\\", "  two\\", "", "three"]), ["one\n  two\n", "three"]);
        assert_eq!(inputs(&["\"\"\"", "a\\", "", "/b", "\"\"\"", "c"]), ["a\\\n\n/b", "c"]);
        assert_eq!(inputs(&["\"\"\"a", "b\"\"\"", "\"\"\"c\"\"\"", "say \"\"\""]), ["a\nb", "c", "say \"\"\""]);
        assert_eq!(inputs(&["one\\", "^C", "^C", "two"]), ["dropped", "dropped", "two"]);
        assert_eq!(inputs(&["\"\"\"", "never closed"]), [""; 0]);
    }
}
