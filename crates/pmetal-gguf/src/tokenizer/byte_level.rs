use std::borrow::Cow;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::pre_tokenizer::PreTokenizer;
use super::vocabulary;
use crate::{GgufFile, Result};

const MERGES: &str = "tokenizer.ggml.merges";

impl GgufFile {
    /// GPT-2's kind: words of bytes, merged in the order of a list.
    pub(super) fn byte_level(&self, tokens: &[Cow<str>]) -> Result<Tokenizer> {
        let pre = self.pre_tokenizer()?;
        let merges = self.required(MERGES, self.strings(MERGES)?)?;
        let merges = merges.iter().map(|merge| match merge.split_once(' ') {
            Some((left, right)) => Ok((left.to_string(), right.to_string())),
            None => {
                Err(self.malformed(format!("metadata key '{MERGES}'"), "two tokens and a space", format!("'{merge}'")))
            }
        });
        let merges = merges.collect::<Result<Vec<_>>>()?;
        let model = BPE::builder()
            .vocab_and_merges(vocabulary(tokens), merges)
            .ignore_merges(pre.ignores_merges)
            .build()
            .map_err(|reason| self.tokenizer_error(reason))?;
        let mut tokenizer = Tokenizer::new(model);
        if pre.nfc {
            tokenizer.with_normalizer(Some(NFC)).map_err(|reason| self.tokenizer_error(reason))?;
        }
        let words = words(pre).map_err(|reason| self.tokenizer_error(reason))?;
        tokenizer.with_pre_tokenizer(Some(words)).with_decoder(Some(ByteLevel::new(false, false, false)));
        Ok(tokenizer)
    }
}

fn words(pre: &PreTokenizer) -> tokenizers::Result<Sequence> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for split in pre.splits {
        let pattern = SplitPattern::Regex((*split).to_string());
        steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(steps))
}
