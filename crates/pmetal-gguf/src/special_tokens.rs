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

/// Texts that end a text, a turn or a message, whatever type the file gives them.
const END_TEXTS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
];

/// Special tokens of code models by their text: the key that may name another one, and what else they are called.
const FILL_IN_THE_MIDDLE: [FillIn; 6] = [
    FillIn {
        key: "fim_pre",
        texts: &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
            "<PRE>",
            "\u{2581}<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
        ends: false,
    },
    FillIn {
        key: "fim_suf",
        texts: &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
            "<SUF>",
            "\u{2581}<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
        ends: false,
    },
    FillIn {
        key: "fim_mid",
        texts: &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
            "<MID>",
            "\u{2581}<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
        ends: false,
    },
    FillIn { key: "fim_pad", texts: &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"], ends: true },
    FillIn {
        key: "fim_rep",
        texts: &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
        ends: true,
    },
    FillIn { key: "fim_sep", texts: &["<|file_sep|>"], ends: true },
];

/// One of the special tokens of code models.
struct FillIn {
    key: &'static str,
    texts: &'static [&'static str],
    /// Generation ends with it.
    ends: bool,
}

/// Tokens of GPT-OSS that are always shown.
const SHOWN: [&str; 4] = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// How a token is found in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
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
        let Some(tokens) = self.tokens()? else { return Ok(SpecialTokens::default()) };
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
        for token in ends.chain(self.ends_by_text(&tokens)?) {
            if !end_of_generation.contains(&token) {
                end_of_generation.push(token);
            }
        }
        Ok(SpecialTokens {
            bos: find("bos", default_bos)?,
            eos,
            pad: find("padding", None)?,
            unk: find("unknown", default_unk)?,
            end_of_generation,
            add_bos: self.adds_bos(model)?,
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

    /// How each token is found in a text. As in llama.cpp, some texts say more than the file does about their type.
    pub(crate) fn token_kinds(&self, tokens: &[Cow<str>]) -> Result<Vec<TokenKind>> {
        const KEY: &str = "tokenizer.ggml.token_type";
        let stated = self.numbers(KEY)?;
        if let Some(types) = stated.as_ref().filter(|types| types.len() < tokens.len()) {
            let expected = format!("{} numbers, one per token", tokens.len());
            return Err(self.malformed(format!("metadata key '{KEY}'"), expected, types.len()));
        }
        let mut kinds: Vec<_> = match stated {
            Some(types) => types.into_iter().take(tokens.len()).map(kind).collect(),
            None => vec![TokenKind::Plain; tokens.len()],
        };
        let texts = Texts::of(tokens);
        let fills = self.fill_ins()?;
        for (text, kind) in tokens.iter().zip(&mut kinds) {
            let text = text.as_ref();
            if SHOWN.contains(&text) || (text == "<|end|>" && texts.end_is_shown) {
                *kind = TokenKind::UserDefined;
            } else if text == "</s>" && texts.s_is_plain {
                *kind = TokenKind::Plain;
            } else if END_TEXTS.contains(&text) || fills.iter().any(|fill| fill.texts.contains(&text)) {
                *kind = TokenKind::Control;
            }
        }
        Ok(kinds)
    }

    /// The special tokens of code models that are known by their text because no key names them.
    fn fill_ins(&self) -> Result<Vec<&'static FillIn>> {
        let mut unnamed = Vec::new();
        for fill in &FILL_IN_THE_MIDDLE {
            if self.unsigned(&format!("tokenizer.ggml.{}_token_id", fill.key))?.is_none() {
                unnamed.push(fill);
            }
        }
        Ok(unnamed)
    }

    /// The tokens whose text says that they end something.
    fn ends_by_text(&self, tokens: &[Cow<str>]) -> Result<Vec<SpecialToken>> {
        let texts = Texts::of(tokens);
        let fills = self.fill_ins()?;
        let ends = |text: &str| {
            let known = END_TEXTS.contains(&text) || fills.iter().any(|fill| fill.ends && fill.texts.contains(&text));
            known && !(text == "<|end|>" && texts.end_is_shown) && !(text == "</s>" && texts.s_is_plain)
        };
        let found = tokens.iter().zip(0_u64..).filter(|(text, _)| ends(text));
        Ok(found.filter_map(|(_, id)| token_at(tokens, id)).collect())
    }
}

/// What the texts of a vocabulary say together.
struct Texts {
    /// `<|end|>` ends a message of several: GPT-OSS's and Solar's formats.
    end_is_shown: bool,
    /// `</s>` is a piece of text: Gemma 4.
    s_is_plain: bool,
}

impl Texts {
    fn of(tokens: &[Cow<str>]) -> Self {
        let has = |text: &str| tokens.iter().any(|token| token == text);
        let calls = has("<|call|>") || has("<|calls|>");
        Self { end_is_shown: calls && (has("<|return|>") || has("<|flush|>")), s_is_plain: has("<|tool_response>") }
    }
}

/// `enum llama_token_type`.
fn kind(number: f64) -> TokenKind {
    match number as i64 {
        2 | 3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        _ => TokenKind::Plain,
    }
}

fn token_at(tokens: &[Cow<str>], id: u64) -> Option<SpecialToken> {
    let text = tokens.get(usize::try_from(id).ok()?)?.to_string();
    Some(SpecialToken { id: u32::try_from(id).ok()?, text })
}
