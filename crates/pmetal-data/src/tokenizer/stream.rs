use super::Tokenizer;
use super::pieces::Pieces;
use crate::error::Result;

/// Ids in, text out, without ever cutting a character: bytes wait until they are complete. What it gives in all is what
/// [`Tokenizer::decode`] gives of all ids at once.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes of a character that is not complete.
    bytes: Vec<u8>,
    /// Nothing came yet: decoders of SentencePiece drop the first space of a text.
    at_start: bool,
    /// All ids, and the bytes of their text that are printed, where a token's text depends on those around it.
    joined: (Vec<u32>, usize),
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, bytes: Vec::new(), at_start: true, joined: (Vec::new(), 0) }
    }

    /// The text that `id` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let pieces = self.tokenizer.pieces;
        if pieces == Pieces::Joined {
            self.joined.0.push(id);
            return self.rest_of_joined(true);
        }
        pieces.append(&self.tokenizer.inner, id, &mut self.bytes);
        if self.at_start && !self.bytes.is_empty() {
            self.at_start = false;
            pieces.strip_start(&mut self.bytes);
        }
        Ok(self.take_complete())
    }

    /// What still waits when no more ids come.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        let rest = self.rest_of_joined(false)?;
        Ok(rest + &String::from_utf8_lossy(&self.bytes))
    }

    fn rest_of_joined(&mut self, more_may_come: bool) -> Result<String> {
        let (ids, printed) = &mut self.joined;
        let text = self.tokenizer.decode(ids)?;
        if more_may_come && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let rest = text.get(*printed..).unwrap_or_default().to_string();
        *printed = text.len();
        Ok(rest)
    }

    /// Takes everything up to a character that more bytes may complete; bytes that can be none become U+FFFD.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut complete = 0;
        for chunk in self.bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            complete += chunk.valid().len();
            let rest = chunk.invalid();
            let at_end = complete + rest.len() == self.bytes.len();
            if rest.is_empty() || (at_end && may_go_on(rest)) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            complete += rest.len();
        }
        self.bytes.drain(..complete);
        text
    }
}

/// Whether bytes at the end of a text are the beginning of a character.
fn may_go_on(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}
