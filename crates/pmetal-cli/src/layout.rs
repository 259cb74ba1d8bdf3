//! Rows of tokens on a terminal of any width, in colour or without.

use std::io::{self, IsTerminal, Write};

use pmetal::data::{RowView, TokenView};

use crate::style::Style;

/// Columns of a line where there is no terminal.
const WIDTH: usize = 80;
/// In front of lines that are trained, and of those that are not.
const MARGINS: [&str; 2] = ["+ ", "  "];
/// Between two tokens.
const BETWEEN: &str = "·";

/// How rows are drawn.
pub struct Layout {
    width: usize,
    style: Style,
}

/// A line being filled with tokens that are all trained, or none.
struct Line {
    text: String,
    columns: usize,
    trained: bool,
}

impl Layout {
    /// For stdout as it is.
    pub fn for_stdout() -> Self {
        let terminal = io::stdout().is_terminal().then(console::Term::stdout);
        let width = terminal.map_or(WIDTH, |terminal| usize::from(terminal.size().1).max(20));
        Self { width, style: Style::stdout() }
    }

    /// One row: a headline, then its tokens. Trained ones stand in lines that begin with a plus; tokens are separated by dots, and every
    /// end of a turn is pointed at.
    pub fn row(&self, out: &mut impl Write, row: &RowView, number: usize, max_seq_len: usize) -> io::Result<()> {
        let limit = if max_seq_len == 0 { row.tokens.len() } else { max_seq_len };
        let kept = row.tokens.get(..limit).unwrap_or(&row.tokens);
        let trained = kept.iter().skip(1).filter(|token| token.trained).count();
        let cut = row.tokens.len() - kept.len();
        let cut = if cut > 0 { format!(", {cut} more are cut off") } else { String::new() };
        let place = format!("{}, {}", row.file.display(), row.place);
        writeln!(
            out,
            "{}",
            self.style.bold(&format!("row {number} ({place}): {} tokens, {trained} trained{cut}", kept.len()))
        )?;
        let mut line: Option<Line> = None;
        for token in kept {
            if line.as_ref().is_some_and(|line| line.trained != token.trained) {
                self.end(out, line.take(), "")?;
            }
            self.token(out, token, &mut line)?;
            if token.ends_turn {
                self.end(out, line.take(), pointer(token.trained))?;
            }
        }
        self.end(out, line, "")?;
        writeln!(out)
    }

    /// What the signs mean.
    pub fn legend(&self, out: &mut impl Write) -> io::Result<()> {
        let example = |text: &str, trained: bool| self.paint(text, trained, false);
        let special = self.paint("special token", false, true);
        writeln!(
            out,
            "{}trained   {}not trained   {special}   {BETWEEN} between tokens   ⏎ line break",
            example("+ ", true),
            example("  ", false)
        )
    }

    fn token(&self, out: &mut impl Write, token: &TokenView, line: &mut Option<Line>) -> io::Result<()> {
        let text = if token.text.is_empty() { "∅".to_string() } else { visible(&token.text) };
        let mut first = true;
        for piece in text.split_inclusive('\n') {
            let broken = piece.ends_with('\n');
            let piece = piece.trim_end_matches('\n');
            let piece = if broken { format!("{piece}⏎") } else { piece.to_string() };
            self.piece(out, &piece, token, first, line)?;
            first = false;
            if broken {
                self.end(out, line.take(), "")?;
            }
        }
        Ok(())
    }

    /// Appends to the line, or begins another where it is full; a piece wider than a line is cut.
    fn piece(
        &self,
        out: &mut impl Write,
        piece: &str,
        token: &TokenView,
        first: bool,
        line: &mut Option<Line>,
    ) -> io::Result<()> {
        let room = self.width.saturating_sub(MARGINS[0].len()).max(8);
        let columns = console::measure_text_width(piece);
        if line.as_ref().is_some_and(|line| line.columns + 1 + columns > room) {
            self.end(out, line.take(), "")?;
        }
        let mut rest = piece;
        while console::measure_text_width(rest) > room {
            let head = console::truncate_str(rest, room, "").into_owned();
            rest = rest.get(head.len()..).unwrap_or_default();
            let full =
                Line { text: self.paint(&head, token.trained, token.special), columns: room, trained: token.trained };
            self.end(out, Some(full), "")?;
        }
        let columns = console::measure_text_width(rest);
        let at = line.get_or_insert_with(|| Line { text: String::new(), columns: 0, trained: token.trained });
        if first && at.columns > 0 {
            at.text.push_str(&self.style.dim(BETWEEN));
            at.columns += 1;
        }
        at.text.push_str(&self.paint(rest, token.trained, token.special));
        at.columns += columns;
        Ok(())
    }

    /// Trained text is green; special tokens are bold.
    fn paint(&self, text: &str, trained: bool, special: bool) -> String {
        let coloured = if trained { self.style.green(text) } else { text.to_string() };
        if special { self.style.bold(&coloured) } else { coloured }
    }

    fn end(&self, out: &mut impl Write, line: Option<Line>, note: &str) -> io::Result<()> {
        let Some(line) = line else { return Ok(()) };
        let margin = MARGINS[usize::from(!line.trained)];
        writeln!(out, "{}{}{note}", self.paint(margin, line.trained, false), line.text)
    }
}

fn pointer(trained: bool) -> &'static str {
    if trained { "  <- end of turn, trained" } else { "  <- end of turn" }
}

/// The text with control characters made visible, line breaks aside.
fn visible(text: &str) -> String {
    let sign = |c: char| match c {
        '\n' => c,
        '\t' => '→',
        c if (c as u32) < 0x20 => char::from_u32(0x2400 + c as u32).unwrap_or(c),
        '\u{7f}' => '␡',
        c => c,
    };
    text.chars().map(sign).collect()
}
