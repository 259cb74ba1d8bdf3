//! The regular expressions that cut a text into words, each meaning what llama.cpp's own splitter of that name does.
//!
//! llama.cpp runs most of them on a copy of the text in which every character beyond ASCII is one letter for its category.
//! So cased classes (`\p{Lu}`) mean any letter there and only ASCII letters have a case: the expressions below say that openly.

/// What follows an apostrophe in English, in either case.
macro_rules! contraction {
    () => {
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    };
}

/// Spaces up to and with a line's end, and other spaces; the last one goes to the word behind it.
macro_rules! spaces {
    () => {
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    };
}

/// Neither letters nor digits, with one space before and the line's end behind; then spaces.
macro_rules! symbols {
    () => {
        concat!(r" ?[^\s\p{L}\p{N}]+[\r\n]*|", spaces!())
    };
}

/// The same, and slashes may mix with the line's end.
macro_rules! symbols_and_slashes {
    () => {
        concat!(r" ?[^\s\p{L}\p{N}]+[\r\n/]*|", spaces!())
    };
}

/// Chinese and Japanese.
macro_rules! chinese_japanese {
    () => {
        r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
    };
}

/// An ASCII mark leads a Latin word; then words with their marks, punctuation, spaces.
macro_rules! deepseek_words {
    () => {
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"##
    };
}

/// GPT-2's words. The letters after an apostrophe are lower case only.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(super) const DIGIT: &str = r"\p{N}";
pub(super) const DIGITS: &str = r"\p{N}+";
pub(super) const THREE_DIGITS: &str = r"\p{N}{1,3}";
pub(super) const THREE_ASCII_DIGITS: &str = "[0-9][0-9][0-9]";
pub(super) const LINES: &str = r"[^\n]+|[\n]+";

/// Digits in groups of up to three.
pub(super) const LLAMA3: &str = concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|", symbols!());
/// As Llama 3, one digit at a time.
pub(super) const QWEN2: &str = concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", symbols!());
/// As Qwen 2; combining marks belong to words.
pub(super) const QWEN35: &str =
    concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|", spaces!());
/// As Qwen 2 without the contractions.
pub(super) const UFAKZEKA: &str = concat!(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", symbols!());
/// As Llama 3, for digits that are cut already.
pub(super) const MINICPM5: &str = concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|", symbols!());
/// As Qwen 2; a line's end stays alone.
pub(super) const SEED_CODER: &str =
    concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|", spaces!());
/// As Qwen 2; one line's end at a time.
pub(super) const BAILING: &str =
    concat!(contraction!(), r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+");
/// Words may hold spaces.
pub(super) const EXAONE_MOE: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
);
/// As Llama 3; long runs of spaces are cut at powers of two.
pub(super) const JAIS2: &str = concat!(
    contraction!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)",
    r"|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
);
/// Mistral's: words also end between a lower-case and an upper-case letter.
pub(super) const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}|",
    symbols_and_slashes!()
);
/// As Mistral's, with contractions behind words and digits in groups of up to three.
pub(super) const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+",
    contraction!(),
    r"?|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*",
    contraction!(),
    r"?|\p{N}{1,3}|",
    symbols_and_slashes!()
);
/// As GPT-4o's, whatever the case; combining marks belong to words.
pub(super) const TINY_AYA: &str =
    concat!(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", contraction!(), r"?|\p{N}{1,3}|", symbols_and_slashes!());
/// The same, one digit at a time, for what [`YOUTU_SCRIPTS`] left.
pub(super) const YOUTU: &str =
    concat!(r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", contraction!(), r"?|\p{N}|", symbols_and_slashes!());
pub(super) const YOUTU_SCRIPTS: &str = concat!(
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}",
    r"\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|",
    chinese_japanese!()
);
/// Chinese characters apart from all else.
pub(super) const KIMI_K2: &str = concat!(
    r"[\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{2F800}-\x{2FA1F}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}",
    r"\x{2F800}-\x{2FA1F}]]+",
    contraction!(),
    r"?|\p{N}{1,3}|",
    symbols!()
);

pub(super) const CHINESE_JAPANESE: &str = chinese_japanese!();
pub(super) const DEEPSEEK3: &str = concat!(deepseek_words!(), r"[\r\n]*|", spaces!());
pub(super) const SPARK: &str = concat!(deepseek_words!(), r"|[\r\n]|\s+(?!\S)|\s+");
pub(super) const LINE_END: &str = r"[\r\n]";
pub(super) const DEEPSEEK_CODER_LETTERS: &str = r"\s?\p{L}+";
pub(super) const DEEPSEEK_CODER_PUNCTUATION: &str = r"\s?\p{P}+";
/// Without the spaces among them, which llama.cpp hides from such classes.
pub(super) const DEEPSEEK_ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}&&\S]+";
/// U+3000, which the model's own class has, is only ever a space for llama.cpp.
pub(super) const DEEPSEEK_LLM_PUNCTUATION: &str =
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+";
pub(super) const SPACES_AT_END: &str = r"\s+\z";
/// The alphabets with cases.
pub(super) const DEEPSEEK_LLM_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}",
    r"\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}",
    r"\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}",
    r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}",
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}",
    r"\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}",
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}",
    r"\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}",
    r"\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}",
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
    "]+"
);

pub(super) const FALCON_PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|`]+";
pub(super) const DEFAULT_PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
pub(super) const BLOOM: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";
pub(super) const CHAMELEON_SENTINEL: &str = "<sentinel:[0-9]+>";
pub(super) const CHAMELEON_IMAGE: &str = "(?:IMGIMG)(?:A|B|C|D|E|F|G|H|I){1,4}Z";
pub(super) const CHAMELEON_SPACES: &str = r"[\t\n]|    |  ";
pub(super) const CHAMELEON_PUNCTUATION: &str = r"[\p{P}!-/:-@\[-`{-~]";

/// Digits in threes counted from a number's end. What stands before a number stays with its first group.
pub(super) const THREES_FROM_THE_END: &str = concat!(
    r"[^\p{N}]++(?:\p{N}{1,2}(?=(?:\p{N}{3})*+(?!\p{N}))|\p{N}{3})?",
    r"|(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})*+(?!\p{N}))|\p{N}{3}"
);
/// Begins at U+8C48 and not, as the model's own, at U+F900: llama.cpp's source has the composed character.
pub(super) const AFMOE_ASIAN: &str = concat!(
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}",
    r"\x{E40}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}",
    r"\x{1100}-\x{11FF}]+"
);

/// Characters that llama.cpp's tables (Unicode 15.1) have no category for.
const NEWER_CHARACTERS: &str = concat!(
    r"\x{897}\x{1B4E}-\x{1B4F}\x{1B7F}\x{1C89}-\x{1C8A}\x{2427}-\x{2429}\x{31E4}-\x{31E5}\x{A7CB}-\x{A7CD}",
    r"\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3}\x{10D40}-\x{10D8F}\x{10EC2}-\x{10EFC}\x{11380}-\x{113E2}\x{116D0}-\x{116E3}",
    r"\x{11BC0}-\x{11BF9}\x{11F5A}\x{13460}-\x{143FA}\x{16100}-\x{16139}\x{16D40}-\x{16D79}\x{18CFF}",
    r"\x{1CC00}-\x{1CEB3}\x{1E5D0}-\x{1E5FF}\x{1F8B2}-\x{1F8C1}\x{1FA89}-\x{1FA8F}\x{1FABE}\x{1FAC6}",
    r"\x{1FADC}-\x{1FADF}\x{1FAE9}\x{1FBCB}-\x{1FBEF}"
);

/// The expression with the categories of llama.cpp's edition of Unicode. Only classes both engines know are used, ours and the
/// one (Oniguruma) that `transformers` runs the written `tokenizer.json` with.
pub(super) fn as_llama_cpp_reads(pattern: &str) -> String {
    let classes = [r"\p{L}", r"\p{N}", r"\p{M}", r"\p{P}", r"\p{S}"];
    classes.iter().fold(pattern.to_string(), |pattern, class| {
        pattern.replace(class, &format!("[{class}&&[^{NEWER_CHARACTERS}]]"))
    })
}
