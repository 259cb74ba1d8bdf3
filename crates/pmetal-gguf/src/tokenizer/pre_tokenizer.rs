use super::patterns::*;
use crate::{GgufFile, Result};

/// How byte-pair encoding cuts a text into words, by the name in `tokenizer.ggml.pre`.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// The names that mean this one.
    pub(crate) names: &'static [&'static str],
    /// Regular expressions, applied one after the other: what one matches and what it leaves are words for the next.
    pub(crate) splits: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges say.
    pub(crate) ignores_merges: bool,
    /// bos is put first where the file does not say.
    pub(crate) adds_bos: bool,
    /// What the vocabulary is written in.
    pub(crate) alphabet: Alphabet,
}

/// What the tokens of a vocabulary are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alphabet {
    /// One visible character for each byte, as GPT-2's.
    Bytes,
    /// Text, with SentencePiece's visible space, and `<0xE4>` for bytes of other characters.
    Text,
}

/// Splits under names, with nothing special about them.
const fn words(names: &'static [&'static str], splits: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, splits, ignores_merges: false, adds_bos: false, alphabet: Alphabet::Bytes }
}

impl PreTokenizer {
    const fn ignoring_merges(mut self) -> Self {
        self.ignores_merges = true;
        self
    }

    const fn adding_bos(mut self) -> Self {
        self.adds_bos = true;
        self
    }

    const fn written_in(mut self, alphabet: Alphabet) -> Self {
        self.alphabet = alphabet;
        self
    }
}

/// Names and expressions are llama.cpp's (`src/llama-vocab.cpp`).
const KNOWN: [PreTokenizer; 32] = [
    words(&["gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion"], &[GPT2]),
    words(&["granite-docling"], &[GPT2]),
    words(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[DIGIT, GPT2],
    ),
    words(&["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], &[LLAMA3])
        .ignoring_merges()
        .adding_bos(),
    words(&["smaug-bpe", "dbrx", "chatglm-bpe"], &[LLAMA3]),
    words(&["glm4", "glm5"], &[LLAMA3]).ignoring_merges(),
    words(&["qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"], &[QWEN2]),
    words(&["qwen35"], &[QWEN35]),
    words(&["tekken"], &[TEKKEN]).ignoring_merges().adding_bos(),
    words(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    words(&["tiny_aya", "cohere2moe"], &[THREES_FROM_THE_END, TINY_AYA]),
    words(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[THREE_DIGITS, CHINESE_JAPANESE, DEEPSEEK3]),
    words(
        &["deepseek-llm"],
        &[LINE_END, DEEPSEEK_LLM_LETTERS, DEEPSEEK_LLM_PUNCTUATION, SPACES_AT_END, DEEPSEEK_ASIAN, DIGITS],
    ),
    words(&["deepseek-coder"], &[LINE_END, DEEPSEEK_CODER_LETTERS, DEEPSEEK_CODER_PUNCTUATION, DEEPSEEK_ASIAN, DIGIT]),
    words(&["spark2_5"], &[THREE_DIGITS, CHINESE_JAPANESE, SPARK, DIGIT]),
    words(&["youtu"], &[YOUTU_SCRIPTS, YOUTU]).ignoring_merges(),
    words(&["falcon"], &[FALCON_PUNCTUATION, GPT2, THREE_ASCII_DIGITS]),
    words(&["poro-chat", "bloom", "gpt3-finnish"], &[BLOOM]),
    words(&["viking"], &[BLOOM, DIGIT]),
    words(&["chameleon"], &[CHAMELEON_SENTINEL, CHAMELEON_IMAGE, CHAMELEON_SPACES, DIGIT, CHAMELEON_PUNCTUATION, GPT2])
        .adding_bos(),
    words(&["kimi-k2"], &[KIMI_K2]),
    words(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    words(&["seed-coder"], &[SEED_CODER]),
    words(&["ufakzeka"], &[UFAKZEKA]),
    words(&["afmoe"], &[THREES_FROM_THE_END, AFMOE_ASIAN, DEEPSEEK3]),
    words(&["laguna"], &[LINES, QWEN2]),
    words(&["exaone-moe"], &[EXAONE_MOE]),
    words(&["minicpm5"], &[THREE_DIGITS, MINICPM5]).ignoring_merges(),
    words(&["jais-2"], &[JAIS2]),
    words(&["gemma4"], &[LINES]).adding_bos().written_in(Alphabet::Text),
    words(&["sarvam-moe"], &[LINES]).written_in(Alphabet::Text),
    words(&["default"], &[DEFAULT_PUNCTUATION, GPT2, DIGITS, THREE_ASCII_DIGITS]),
];

const KEY: &str = "tokenizer.ggml.pre";

impl GgufFile {
    /// The pre-tokenizer the file names. Guessing one would give other ids without a word, so none is ever assumed.
    pub(crate) fn pre_tokenizer(&self) -> Result<&'static PreTokenizer> {
        let found = match self.string(super::MODEL)? {
            Some("gemma4") => "gemma4",
            _ => self.required(KEY, self.string(KEY)?)?,
        };
        KNOWN.iter().find(|known| known.names.contains(&found)).ok_or_else(|| {
            let known: Vec<_> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
            self.unknown("pre-tokenizer", found, known.join(", "))
        })
    }
}
