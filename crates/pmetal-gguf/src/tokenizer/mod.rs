//! The tokenizer in a file's metadata, rebuilt for the `tokenizers` library. Its ids are llama.cpp's.

mod byte_level;
mod patterns;
mod pre_tokenizer;
mod sentence_piece;

use std::borrow::Cow;
use std::collections::HashMap;

use tokenizers::models::bpe::Vocab;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::special_tokens::TokenKind;
use crate::{Error, GgufFile, Result, SpecialToken, SpecialTokens};

const TOKENS: &str = "tokenizer.ggml.tokens";
const MODEL: &str = "tokenizer.ggml.model";

impl GgufFile {
    /// The tokenizer: byte-level BPE (`gpt2`), SentencePiece BPE (`llama`) or BPE over text (`gemma4`), with its special
    /// tokens. With `add_special_tokens` it puts bos before a text and eos behind it where llama.cpp does.
    ///
    /// Ids are llama.cpp's, also where a model's own tokenizer differs: it composes no characters (Qwen's own does), and
    /// characters newer than Unicode 15.1 are neither letters nor digits. One difference is left: Phi-3's special tokens
    /// swallow every space behind them, in llama.cpp those of ASCII.
    ///
    /// # Errors
    /// When the file has none, it is of another kind, its pre-tokenizer is not known, a token is there twice, or its
    /// vocabulary and merges contradict each other.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokens = self.required(TOKENS, self.tokens()?)?;
        self.check_once_each(&tokens)?;
        let special = self.special_tokens()?;
        let mut tokenizer = match self.required(MODEL, self.string(MODEL)?)? {
            "gpt2" | "gemma4" => self.byte_pair(&tokens)?,
            "llama" => self.sentence_piece(&tokens, &special)?,
            other => return Err(self.unknown("tokenizer model", other, "gpt2, llama, gemma4".to_string())),
        };
        self.add_matched_whole(&mut tokenizer, &tokens)?;
        if let Some(processor) = ends_processor(&special).map_err(|reason| self.tokenizer_error(reason))? {
            tokenizer.with_post_processor(Some(processor));
        }
        Ok(tokenizer)
    }

    /// Whether bos goes before a text. Files of Gemma 4 that say no are wrong.
    pub(crate) fn adds_bos(&self, model: &str) -> Result<bool> {
        let stated = self.boolean("tokenizer.ggml.add_bos_token")?;
        let default = model == "llama" || self.pre_tokenizer().is_ok_and(|pre| pre.adds_bos);
        Ok(model == "gemma4" || stated.unwrap_or(default))
    }

    /// The texts of all tokens by id; one without a text gets the name llama.cpp gives it.
    pub(crate) fn tokens(&self) -> Result<Option<Vec<Cow<'_, str>>>> {
        let Some(mut tokens) = self.strings(TOKENS)? else { return Ok(None) };
        for (id, token) in tokens.iter_mut().enumerate().filter(|(_, token)| token.is_empty()) {
            *token = format!("[EMPTY_{id}]").into();
        }
        Ok(Some(tokens))
    }

    fn check_once_each(&self, tokens: &[Cow<str>]) -> Result<()> {
        let mut seen = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = seen.insert(token.as_ref(), id) {
                let found = format!("{token:?} as {first} and as {id}");
                return Err(self.malformed(format!("metadata key '{TOKENS}'"), "each token once", found));
            }
        }
        Ok(())
    }

    /// Registers the tokens that are matched whole, before anything else looks at the text.
    fn add_matched_whole(&self, tokenizer: &mut Tokenizer, tokens: &[Cow<str>]) -> Result<()> {
        let kinds = self.token_kinds(tokens)?;
        let swallows = self.tokens_swallow_spaces()?;
        let matched = tokens.iter().zip(kinds).filter(|(_, kind)| *kind != TokenKind::Plain);
        let added = matched.map(|(text, kind)| {
            let rstrip = swallows && !["<unk>", "<s>", "<|endoftext|>"].contains(&text.as_ref());
            AddedToken::from(text.as_ref(), kind == TokenKind::Control).normalized(false).rstrip(rstrip)
        });
        tokenizer.add_tokens(added).map_err(|reason| self.tokenizer_error(reason))?;
        Ok(())
    }

    /// Whether spaces behind a special token are dropped. No key says it: llama.cpp goes by the model's name. It drops ASCII's
    /// spaces, `tokenizers` also those beyond, as the model's own tokenizer does: the one place where ids differ.
    fn tokens_swallow_spaces(&self) -> Result<bool> {
        let name = self.string("general.name")?.unwrap_or_default().to_ascii_lowercase();
        Ok(name.contains("phi-3") || name.contains("phi3"))
    }

    fn tokenizer_error(&self, reason: impl ToString) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() }
    }

    fn unknown(&self, what: &'static str, found: &str, known: String) -> Error {
        Error::Unknown { path: self.path.clone(), what, found: found.to_string(), known }
    }
}

fn vocabulary(tokens: &[Cow<str>]) -> Vocab {
    tokens.iter().zip(0_u32..).map(|(token, id)| (token.to_string(), id)).collect()
}

/// Puts bos before and eos behind a text (and each of a pair), where the model wants them.
fn ends_processor(special: &SpecialTokens) -> std::result::Result<Option<TemplateProcessing>, String> {
    let bos = special.bos.as_ref().filter(|_| special.add_bos);
    let eos = special.eos.as_ref().filter(|_| special.add_eos);
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let side = |sequence: &str, kind: u32| {
        let piece = |token: &SpecialToken| format!("{}:{kind}", token.text);
        let text = format!("{sequence}:{kind}");
        bos.map(piece).into_iter().chain([text]).chain(eos.map(piece)).collect::<Vec<_>>()
    };
    let mut specials: Vec<_> = bos.into_iter().chain(eos).map(|token| (token.text.clone(), token.id)).collect();
    specials.dedup();
    TemplateProcessing::builder()
        .try_single(side("$A", 0))?
        .try_pair([side("$A", 0), side("$B", 1)].concat())?
        .special_tokens(specials)
        .build()
        .map(Some)
        .map_err(|reason| reason.to_string())
}
