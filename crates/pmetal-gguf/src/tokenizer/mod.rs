//! The tokenizer in a file's metadata, rebuilt for the `tokenizers` library. Its ids are llama.cpp's.

mod byte_level;
mod pre_tokenizer;
mod sentence_piece;

use std::borrow::Cow;

use tokenizers::models::bpe::Vocab;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::special_tokens::TokenType;
use crate::{Error, GgufFile, Result, SpecialToken, SpecialTokens};

const TOKENS: &str = "tokenizer.ggml.tokens";
const MODEL: &str = "tokenizer.ggml.model";

impl GgufFile {
    /// The tokenizer: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`), with its special tokens. With
    /// `add_special_tokens` it puts bos before a text and eos behind it where the model's own does.
    ///
    /// # Errors
    /// When the file has none, it is of another kind, its pre-tokenizer is not known, or its vocabulary and merges contradict
    /// each other.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokens = self.required(TOKENS, self.strings(TOKENS)?)?;
        let special = self.special_tokens()?;
        let mut tokenizer = match self.required(MODEL, self.string(MODEL)?)? {
            "gpt2" => self.byte_level(&tokens)?,
            "llama" => self.sentence_piece(&tokens, &special)?,
            other => return Err(self.unknown("tokenizer model", other, "gpt2, llama".to_string())),
        };
        self.add_matched_whole(&mut tokenizer, &tokens)?;
        if let Some(processor) = ends_processor(&special).map_err(|reason| self.tokenizer_error(reason))? {
            tokenizer.with_post_processor(Some(processor));
        }
        Ok(tokenizer)
    }

    /// What `add_bos_token` means where the file does not say.
    pub(crate) fn adds_bos_by_default(&self, model: &str) -> bool {
        model == "llama" || self.pre_tokenizer().is_ok_and(|pre| pre.adds_bos)
    }

    /// Registers the tokens that are matched whole, before anything else looks at the text.
    fn add_matched_whole(&self, tokenizer: &mut Tokenizer, tokens: &[Cow<str>]) -> Result<()> {
        let types = self.token_types()?;
        let matched = tokens.iter().zip(types).filter(|(_, kind)| *kind != TokenType::Plain);
        let added =
            matched.map(|(text, kind)| AddedToken::from(text.as_ref(), kind == TokenType::Control).normalized(false));
        tokenizer.add_tokens(added).map_err(|reason| self.tokenizer_error(reason))?;
        Ok(())
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
