use std::borrow::Cow;
use std::collections::HashSet;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::patterns::as_llama_cpp_reads;
use super::pre_tokenizer::{Alphabet, PreTokenizer};
use super::sentence_piece::SPACE;
use super::vocabulary;
use crate::{GgufFile, Result};

const MERGES: &str = "tokenizer.ggml.merges";

impl GgufFile {
    /// Words merged in the order of a list: GPT-2's kind, on bytes, or Gemma 4's, on text.
    pub(super) fn byte_pair(&self, tokens: &[Cow<str>]) -> Result<Tokenizer> {
        let pre = self.pre_tokenizer()?;
        let bytes = pre.alphabet == Alphabet::Bytes;
        let vocabulary = vocabulary(tokens);
        let merges = self.merges(&vocabulary)?;
        let model = BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .ignore_merges(pre.ignores_merges)
            .byte_fallback(!bytes)
            .build()
            .map_err(|reason| self.tokenizer_error(reason))?;
        let mut tokenizer = Tokenizer::new(model);
        let words = words(pre, tokens).map_err(|reason| self.tokenizer_error(reason))?;
        tokenizer.with_pre_tokenizer(Some(words));
        if bytes {
            tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
        } else {
            let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|reason| self.tokenizer_error(reason));
            tokenizer.with_normalizer(Some(replace(" ", SPACE)?)).map_err(|reason| self.tokenizer_error(reason))?;
            let steps: [DecoderWrapper; 3] =
                [replace(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
            tokenizer.with_decoder(Some(Decoders::new(steps.into())));
        }
        Ok(tokenizer)
    }

    /// The merges, each once: a repeated one counts where it stands first.
    fn merges(&self, vocabulary: &Vocab) -> Result<Merges> {
        let merges = self.required(MERGES, self.strings(MERGES)?)?;
        let mut seen = HashSet::with_capacity(merges.len());
        let mut once = Vec::with_capacity(merges.len());
        for merge in &merges {
            if seen.insert(merge.as_ref()) {
                once.push(self.merge(merge, vocabulary)?);
            }
        }
        Ok(once)
    }

    /// The parts of a merge. A token may itself be a space: the one that separates is not the first character.
    fn merge(&self, text: &str, vocabulary: &Vocab) -> Result<(String, String)> {
        let wrong = |expected: &str| self.malformed(format!("metadata key '{MERGES}'"), expected, format!("'{text}'"));
        let separates = text.char_indices().skip(1).find(|(_, character)| *character == ' ');
        let parts = separates.and_then(|(at, _)| Some((text.get(..at)?, text.get(at + 1..)?)));
        let (left, right) = parts.ok_or_else(|| wrong("two tokens and a space"))?;
        if [left, right, &format!("{left}{right}")].iter().any(|token| !vocabulary.contains_key(*token)) {
            return Err(wrong("tokens that make a token"));
        }
        Ok((left.to_string(), right.to_string()))
    }
}

fn words(pre: &PreTokenizer, tokens: &[Cow<str>]) -> tokenizers::Result<Sequence> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    let isolated = |pattern| Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false);
    for split in pre.splits {
        steps.push(isolated(as_llama_cpp_reads(split))?.into());
    }
    if pre.alphabet == Alphabet::Bytes {
        steps.push(ByteLevel::new(false, false, false).into());
        // A byte without a token gives no id, but nothing merges across it.
        let missing = bytes_without_a_token(tokens);
        if !missing.is_empty() && !pre.ignores_merges {
            steps.push(isolated(format!("[{missing}]"))?.into());
        }
    }
    Ok(Sequence::new(steps))
}

/// The visible characters of bytes that the vocabulary has no token for, as a class of a regular expression has them.
fn bytes_without_a_token(tokens: &[Cow<str>]) -> String {
    let alone: HashSet<&str> = tokens.iter().map(Cow::as_ref).filter(|token| token.chars().count() == 1).collect();
    let mut missing: Vec<char> =
        ByteLevel::alphabet().into_iter().filter(|character| !alone.contains(character.to_string().as_str())).collect();
    missing.sort_unstable();
    missing.into_iter().map(|character| format!("\\x{{{:X}}}", u32::from(character))).collect()
}
