use std::borrow::Cow;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, NormalizerWrapper, Tokenizer};

use super::vocabulary;
use crate::{GgufFile, Result, SpecialTokens};

/// SentencePiece's visible space.
pub(super) const SPACE: &str = "\u{2581}";
const SCORES: &str = "tokenizer.ggml.scores";
/// Pieces are a few characters long; the merges of anything beyond this would be sought for nothing.
const LONGEST_PIECE: usize = 1024;

impl GgufFile {
    /// Llama 2's kind: SentencePiece BPE over a whole text, pieces merged by score, other characters as their bytes.
    pub(super) fn sentence_piece(&self, tokens: &[Cow<str>], special: &SpecialTokens) -> Result<Tokenizer> {
        let scores = self.required(SCORES, self.numbers(SCORES)?)?;
        if scores.len() < tokens.len() {
            let expected = format!("{} numbers, one per token", tokens.len());
            return Err(self.malformed(format!("metadata key '{SCORES}'"), expected, scores.len()));
        }
        let vocabulary = vocabulary(tokens);
        let merges = merges_by_score(tokens, &scores, &vocabulary);
        let mut builder = BPE::builder().vocab_and_merges(vocabulary, merges).byte_fallback(true).fuse_unk(true);
        if let Some(unk) = &special.unk {
            builder = builder.unk_token(unk.text.clone());
        }
        let mut tokenizer = Tokenizer::new(builder.build().map_err(|reason| self.tokenizer_error(reason))?);
        let prefix = self.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let (normalizer, decoder) = spaces(prefix).map_err(|reason| self.tokenizer_error(reason))?;
        tokenizer.with_normalizer(Some(normalizer)).map_err(|reason| self.tokenizer_error(reason))?;
        tokenizer.with_decoder(Some(decoder));
        Ok(tokenizer)
    }
}

/// Every way to put a piece together from two others, best score first: what SentencePiece would merge next is what comes
/// first in this list. Of several ways to make one piece, the one with the longer left part comes first.
fn merges_by_score(tokens: &[Cow<str>], scores: &[f64], vocabulary: &Vocab) -> Vec<(String, String)> {
    let mut ways = Vec::new();
    for (token, &score) in tokens.iter().zip(scores).filter(|(token, _)| token.len() <= LONGEST_PIECE) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if vocabulary.contains_key(left) && vocabulary.contains_key(right) {
                ways.push((score, left, right));
            }
        }
    }
    ways.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| b.1.len().cmp(&a.1.len())));
    ways.into_iter().map(|(_, left, right)| (left.to_string(), right.to_string())).collect()
}

/// A space becomes visible, and one is put before the text and behind every special token; decoding undoes it.
fn spaces(prefix: bool) -> tokenizers::Result<(Normalizers, Decoders)> {
    let visible: NormalizerWrapper = Replace::new(" ", SPACE)?.into();
    let prepend = prefix.then(|| Prepend::new(SPACE.to_string()).into());
    let normalizer = Normalizers::new(prepend.into_iter().chain([visible]).collect());
    let space: DecoderWrapper = Replace::new(SPACE, " ")?.into();
    let strip = prefix.then(|| Strip::new(' ', 1, 0).into());
    let steps = [space, ByteFallback::new().into(), Fuse::new().into()];
    Ok((normalizer, Decoders::new(steps.into_iter().chain(strip).collect())))
}
