use std::borrow::Cow;

use crate::{GgufFile, Result};

/// A token with a meaning of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// Its text, as `<|im_end|>`.
    pub text: String,
}

/// The special tokens a file names.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<SpecialToken>,
    /// Ends a text.
    pub eos: Option<SpecialToken>,
    /// Fills up a batch.
    pub pad: Option<SpecialToken>,
    /// Stands for what the vocabulary has no token for.
    pub unk: Option<SpecialToken>,
    /// Every token that ends generation: `eos`, the ends of a turn and of a message where the file names them, and tokens
    /// known by their text to be one, as llama.cpp does. `eos` first, no token twice.
    pub end_of_generation: Vec<SpecialToken>,
    /// Whether the tokenizer puts `bos` before a text.
    pub add_bos: bool,
    /// Whether the tokenizer puts `eos` behind a text.
    pub add_eos: bool,
}

/// Texts that end a turn or a message in the chat formats of the supported architectures.
const END_TEXTS: [&str; 7] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>"];

/// What a token is (`enum llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenType {
    /// A piece of text, a single byte, or unused.
    Plain,
    /// Matched whole in a text, hidden from decoded text when asked for.
    Control,
    /// Matched whole in a text, always shown.
    UserDefined,
}

impl GgufFile {
    /// The special tokens of the file; all empty when it has no tokenizer. An id beyond the vocabulary counts as not stated,
    /// as in llama.cpp: files with such a padding id are about.
    ///
    /// # Errors
    /// When a key is of the wrong type.
    pub fn special_tokens(&self) -> Result<SpecialTokens> {
        let Some(tokens) = self.strings("tokenizer.ggml.tokens")? else { return Ok(SpecialTokens::default()) };
        let model = self.string("tokenizer.ggml.model")?.unwrap_or_default();
        // llama.cpp: what SentencePiece models have where the file is silent.
        let (default_unk, default_bos, default_eos) =
            if model == "llama" { (Some(0), Some(1), Some(2)) } else { (None, None, None) };
        let find = |name: &str, default: Option<u64>| -> Result<Option<SpecialToken>> {
            let stated =
                self.unsigned(&format!("tokenizer.ggml.{name}_token_id"))?.and_then(|id| token_at(&tokens, id));
            Ok(stated.or_else(|| token_at(&tokens, default?)))
        };
        let eos = find("eos", default_eos)?;
        let ends = [eos.clone(), find("eot", None)?, find("eom", None)?].into_iter().flatten();
        let mut end_of_generation: Vec<SpecialToken> = Vec::new();
        for token in ends.chain(ends_by_text(&tokens, &self.token_types()?)) {
            if !end_of_generation.contains(&token) {
                end_of_generation.push(token);
            }
        }
        let default_add_bos = self.adds_bos_by_default(model);
        Ok(SpecialTokens {
            bos: find("bos", default_bos)?,
            eos,
            pad: find("padding", None)?,
            unk: find("unknown", default_unk)?,
            end_of_generation,
            add_bos: self.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(default_add_bos),
            add_eos: self.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        })
    }

    /// The chat template, Jinja, if the file has one.
    ///
    /// # Errors
    /// When the key is there and no string.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        self.string("tokenizer.chat_template")
    }

    /// The types of all tokens; those the file is silent about are plain.
    pub(crate) fn token_types(&self) -> Result<Vec<TokenType>> {
        let types = self.numbers("tokenizer.ggml.token_type")?.unwrap_or_default();
        let kind = |number: f64| match number as i64 {
            2 | 3 => TokenType::Control,
            4 => TokenType::UserDefined,
            _ => TokenType::Plain,
        };
        Ok(types.into_iter().map(kind).collect())
    }
}

fn token_at(tokens: &[Cow<str>], id: u64) -> Option<SpecialToken> {
    let text = tokens.get(usize::try_from(id).ok()?)?.to_string();
    Some(SpecialToken { id: u32::try_from(id).ok()?, text })
}

/// The tokens matched whole whose text says that they end something.
fn ends_by_text(tokens: &[Cow<str>], types: &[TokenType]) -> impl Iterator<Item = SpecialToken> {
    let ids = tokens.iter().zip(types).zip(0_u64..);
    let ends = ids.filter(|((text, kind), _)| **kind != TokenType::Plain && END_TEXTS.contains(&text.as_ref()));
    ends.filter_map(|(_, id)| token_at(tokens, id))
}
