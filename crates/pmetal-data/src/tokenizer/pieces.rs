use std::sync::LazyLock;
use std::{array, collections::HashMap};

use tokenizers::{DecoderWrapper, ModelWrapper, Tokenizer};

/// SentencePiece's visible space.
const SPACE: char = '\u{2581}';

/// What the tokens of a vocabulary are written in, so that each gives its bytes whatever stands beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pieces {
    /// One visible character for each byte, as GPT-2's.
    Bytes,
    /// Text with visible spaces, other characters byte by byte as `<0xE4>`; the first space of a text may be dropped.
    Text { drops_first_space: bool },
    /// Tokens whose text depends on the tokens around.
    Joined,
}

impl Pieces {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let steps = match tokenizer.get_decoder() {
            Some(DecoderWrapper::Sequence(steps)) => steps.get_decoders(),
            Some(one) => array::from_ref(one),
            None => return Self::Joined,
        };
        if steps.iter().any(|step| matches!(step, DecoderWrapper::ByteLevel(_))) {
            return Self::Bytes;
        }
        let falls_back = steps.iter().any(|step| matches!(step, DecoderWrapper::ByteFallback(_)));
        if falls_back && matches!(tokenizer.get_model(), ModelWrapper::BPE(_)) {
            let strips = |step: &DecoderWrapper| matches!(step, DecoderWrapper::Strip(strip) if strip.start > 0);
            return Self::Text { drops_first_space: steps.iter().any(strips) };
        }
        Self::Joined
    }

    /// Adds the bytes of a token; none for a special one.
    pub(super) fn append(self, tokenizer: &Tokenizer, id: u32, bytes: &mut Vec<u8>) {
        let Some(token) = tokenizer.id_to_token(id) else { return };
        if tokenizer.get_added_vocabulary().is_special_token(&token) {
            return;
        }
        if self == Self::Bytes {
            let from = bytes.len();
            for character in token.chars() {
                let Some(&byte) = BYTES.get(&character) else {
                    // An added token is text.
                    bytes.truncate(from);
                    bytes.extend(token.bytes());
                    break;
                };
                bytes.push(byte);
            }
        } else if let Some(byte) = fallback_byte(&token) {
            bytes.push(byte);
        } else {
            bytes.extend(token.replace(SPACE, " ").bytes());
        }
    }

    /// Drops the first space of a text's bytes where the decoder does.
    pub(super) fn strip_start(self, bytes: &mut Vec<u8>) {
        if self == (Self::Text { drops_first_space: true }) && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
    }
}

/// The byte of `<0xE4>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's visible characters for bytes: printable ones stand for themselves, the others are numbered from U+0100.
static BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let visible = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let themselves = (0..=u8::MAX).filter(visible).map(|byte| (char::from(byte), byte));
    let numbered = (0x100_u32..).filter_map(char::from_u32).zip((0..=u8::MAX).filter(|byte| !visible(byte)));
    themselves.chain(numbered).collect()
});
