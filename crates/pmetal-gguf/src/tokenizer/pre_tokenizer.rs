use crate::{GgufFile, Result};

/// How byte-level BPE cuts a text into words, by the name in `tokenizer.ggml.pre`.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// The names that mean this one.
    pub(crate) names: &'static [&'static str],
    /// Regular expressions, applied one after the other: what one matches and what it leaves are words for the next.
    pub(crate) splits: &'static [&'static str],
    /// Composed to NFC first, as the model's own tokenizer does. llama.cpp leaves that out: the one place where ids differ.
    pub(crate) nfc: bool,
    /// A word that is a token is taken whole, whatever the merges say.
    pub(crate) ignores_merges: bool,
    /// bos is put first where the file does not say.
    pub(crate) adds_bos: bool,
}

/// GPT-2's words. The letters after an apostrophe are lower case only.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Digits in groups of up to three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Llama 3, one digit at a time.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's: words also end between a lower-case and an upper-case letter.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";

/// Those that files of the known architectures carry; names and expressions are llama.cpp's (`src/llama-vocab.cpp`).
const KNOWN: [PreTokenizer; 8] = [
    PreTokenizer {
        names: &["gpt-2", "phi-2", "gigachat", "a.x-4.0", "exaone4", "olmo", "trillion"],
        splits: &[GPT2],
        nfc: false,
        ignores_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        splits: &[DIGIT, GPT2],
        nfc: false,
        ignores_merges: false,
        adds_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        splits: &[LLAMA3],
        nfc: false,
        ignores_merges: true,
        adds_bos: true,
    },
    PreTokenizer {
        names: &["smaug-bpe", "dbrx"],
        splits: &[LLAMA3],
        nfc: false,
        ignores_merges: false,
        adds_bos: false,
    },
    PreTokenizer { names: &["qwen2"], splits: &[QWEN2], nfc: true, ignores_merges: false, adds_bos: false },
    PreTokenizer {
        names: &["deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan"],
        splits: &[QWEN2],
        nfc: false,
        ignores_merges: false,
        adds_bos: false,
    },
    PreTokenizer { names: &["tekken"], splits: &[TEKKEN], nfc: false, ignores_merges: true, adds_bos: true },
    PreTokenizer {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        nfc: false,
        ignores_merges: false,
        adds_bos: false,
    },
];

const KEY: &str = "tokenizer.ggml.pre";

impl GgufFile {
    /// The pre-tokenizer the file names. Guessing one would give other ids without a word, so none is ever assumed.
    pub(crate) fn pre_tokenizer(&self) -> Result<&'static PreTokenizer> {
        let found = self.required(KEY, self.string(KEY)?)?;
        KNOWN.iter().find(|known| known.names.contains(&found)).ok_or_else(|| {
            let known: Vec<_> = KNOWN.iter().flat_map(|known| known.names).copied().collect();
            self.unknown("pre-tokenizer", found, known.join(", "))
        })
    }
}
