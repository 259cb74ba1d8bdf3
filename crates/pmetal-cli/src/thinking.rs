//! Hides what a model writes between think tags, as the text streams.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Passes text on, less what stands between think tags and the white space after them.
pub struct ThinkFilter {
    inside: bool,
    /// White space is dropped until something else comes: at the start of an answer that thought first.
    trimming: bool,
    /// What may be the beginning of a tag.
    held: String,
}

impl ThinkFilter {
    /// A filter for an answer to `prompt`, which may itself have opened the reasoning.
    pub fn new(prompt: &str) -> Self {
        let inside = prompt.trim_end().ends_with(OPEN);
        Self { inside, trimming: false, held: String::new() }
    }

    /// Takes a piece of text and returns what of it may be shown now.
    pub fn push(&mut self, piece: &str) -> String {
        self.held.push_str(piece);
        let mut shown = String::new();
        loop {
            let tag = if self.inside { CLOSE } else { OPEN };
            let (passed, found) = match self.held.find(tag) {
                Some(at) => (at, true),
                None => (self.held.len() - partial_tag(&self.held, tag), false),
            };
            let text: String = self.held.drain(..passed).collect();
            if !self.inside {
                self.show(&text, &mut shown);
            }
            if !found {
                return shown;
            }
            self.held.drain(..tag.len());
            self.trimming = self.inside;
            self.inside = !self.inside;
        }
    }

    /// What was held back when the text ended.
    pub fn finish(mut self) -> String {
        let rest = std::mem::take(&mut self.held);
        let mut shown = String::new();
        if !self.inside {
            self.show(&rest, &mut shown);
        }
        shown
    }

    fn show(&mut self, text: &str, shown: &mut String) {
        let text = if self.trimming { text.trim_start() } else { text };
        self.trimming &= text.is_empty();
        shown.push_str(text);
    }
}

/// Length of the longest end of `text` that begins `tag`.
fn partial_tag(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.ends_with(&tag[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(prompt: &str, text: &str, piece: usize) -> String {
        let mut filter = ThinkFilter::new(prompt);
        let chars: Vec<char> = text.chars().collect();
        let shown: String = chars.chunks(piece).map(|c| filter.push(&c.iter().collect::<String>())).collect();
        shown + &filter.finish()
    }

    #[test]
    fn reasoning_is_hidden_however_the_text_is_cut() {
        for piece in 1..9 {
            assert_eq!(filtered("", "<think>\nhm\n</think>\n\nYes, 1 < 2.", piece), "Yes, 1 < 2.");
            assert_eq!(filtered("…<think>\n", "hm</think> Yes", piece), "Yes");
            assert_eq!(filtered("", "a <thin b <", piece), "a <thin b <");
            assert_eq!(filtered("", "<think>never closed", piece), "");
        }
    }
}
