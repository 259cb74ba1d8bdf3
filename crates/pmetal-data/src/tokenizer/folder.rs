//! A tokenizer in Hugging Face's layout. What transformers 5 does with its files beyond reading `tokenizer.json`.

use std::{collections::HashSet, fs, io::ErrorKind, path::Path};

use pmetal_gguf::gguf_files_in;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::merges::check_merges;
use super::{Tokenizer, template_files};
use crate::error::{Error, Result};

/// The variables under which chat templates know special tokens, as `tokenizer_config.json` names them.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Tokenizer {
    pub(super) fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return match gguf_files_in(folder).unwrap_or_default().as_slice() {
                    [only] => Self::from_gguf(only),
                    _ => Err(Error::NoTokenizer { path: folder.to_path_buf() }),
                };
            }
            Err(source) => return Err(Error::Read { path, source }),
        };
        let broken = |reason: String| {
            let reason = match pmetal_core::what_it_is(&bytes) {
                Some(kind) => format!("is {kind}"),
                None => format!("{reason}; fetch the model's own file again"),
            };
            Error::TokenizerFile { path: path.clone(), reason }
        };
        refuse_delicate(&bytes).map_err(broken)?;
        check_merges(&bytes).map_err(broken)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| broken(e.to_string()))?;
        let refused = |reason: tokenizers::Error| broken(reason.to_string());
        let config = json(&folder.join("tokenizer_config.json"))?;
        let map = json(&folder.join("special_tokens_map.json"))?;
        let model = json(&folder.join("config.json"))?;
        // What says everything about the added tokens makes the older files meaningless.
        let map = if config.get("added_tokens_decoder").is_some() { Value::Null } else { map };
        let text = |name: &str| token_text(map.get(name)).or_else(|| token_text(config.get(name)));
        let special: Vec<_> = SPECIAL_NAMES.iter().filter_map(|name| Some((name.to_string(), text(name)?))).collect();
        let added = added_tokens(&config, &json(&folder.join("added_tokens.json"))?, &map, &special);
        if is_llama_class(&config, &model) && !is_byte_level(&inner) {
            as_llama_class(&mut inner, &config).map_err(refused)?;
        }
        inner.add_tokens(added).map_err(refused)?;
        let mut eos = ids(json(&folder.join("generation_config.json"))?.get("eos_token_id"));
        eos.extend(ids(model.get("eos_token_id")));
        let templates = template_files::read(folder, &config)?;
        let mut tokenizer = Self::assemble(inner, special, eos, templates, &path)?;
        if let Value::Object(config) = config {
            tokenizer.config = config;
        }
        Ok(tokenizer)
    }
}

/// The tokens that the files around `tokenizer.json` add, in the order of their ids; those it has already are no trouble.
fn added_tokens(config: &Value, legacy: &Value, map: &Value, special: &[(String, String)]) -> Vec<AddedToken> {
    let mut by_id: Vec<(u64, AddedToken)> = Vec::new();
    if let Some(Value::Object(decoder)) = config.get("added_tokens_decoder") {
        by_id.extend(decoder.iter().filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token, false)?))));
    } else if let Value::Object(legacy) = legacy {
        let is_special = |text: &str| special.iter().any(|(_, known)| known == text);
        by_id.extend(
            legacy
                .iter()
                .filter_map(|(text, id)| Some((id.as_u64()?, AddedToken::from(text.as_str(), is_special(text))))),
        );
    }
    by_id.sort_by_key(|(id, _)| *id);
    let mut tokens: Vec<AddedToken> = by_id.into_iter().map(|(_, token)| token).collect();
    let mut seen: HashSet<String> = tokens.iter().map(|token| token.content.clone()).collect();
    let stated = |name: &str| map.get(name).or_else(|| config.get(name));
    let named = SPECIAL_NAMES.iter().filter_map(|name| stated(name));
    let listed = |name: &str| match stated(name) {
        Some(Value::Array(tokens)) => tokens.iter().collect(),
        Some(Value::Object(named)) => named.values().collect(),
        _ => Vec::new(),
    };
    // The second is the first's former name.
    let extra = Some(listed("extra_special_tokens")).filter(|tokens| !tokens.is_empty());
    let extra = extra.unwrap_or_else(|| listed("additional_special_tokens"));
    let more = named.chain(extra).filter_map(|token| added_token(token, true));
    tokens.extend(more.filter(|token| seen.insert(token.content.clone())));
    tokens
}

/// A token as text, or as an object with its properties.
fn added_token(value: &Value, special: bool) -> Option<AddedToken> {
    let text = token_text(Some(value)).filter(|text| !text.is_empty())?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = special || flag("special").unwrap_or(false);
    let token = AddedToken::from(text, special)
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .single_word(flag("single_word").unwrap_or(false));
    Some(token.normalized(flag("normalized").unwrap_or(!special)))
}

/// Families whose files name `LlamaTokenizer` and whose `tokenizer.json` counts all the same.
const NAMED_WRONGLY: [&str; 12] = [
    "mistral",
    "mixtral",
    "mistral3",
    "ministral",
    "ministral3",
    "phi3",
    "phimoe",
    "internlm2",
    "internlm3",
    "nemotron",
    "minicpm3",
    "granite",
];

/// `LlamaTokenizer`, which makes everything but vocabulary, merges and added tokens itself.
fn is_llama_class(config: &Value, model: &Value) -> bool {
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let family = model.get("model_type").and_then(Value::as_str).unwrap_or_default();
    class.strip_suffix("Fast").unwrap_or(class) == "LlamaTokenizer" && !NAMED_WRONGLY.contains(&family)
}

fn is_byte_level(inner: &tokenizers::Tokenizer) -> bool {
    let byte_level = |step: &PreTokenizerWrapper| matches!(step, PreTokenizerWrapper::ByteLevel(_));
    match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::Sequence(steps)) => steps.as_ref().iter().any(byte_level),
        Some(one) => byte_level(one),
        None => false,
    }
}

/// A space is put before a text; with `legacy` also behind every special token.
fn as_llama_class(inner: &mut tokenizers::Tokenizer, config: &Value) -> tokenizers::Result<()> {
    let flag = |name: &str| config.get(name).and_then(Value::as_bool);
    let prefix = flag("add_prefix_space").unwrap_or(true);
    let scheme = match (prefix, flag("legacy").unwrap_or(false)) {
        (false, _) => PrependScheme::Never,
        (true, true) => PrependScheme::Always,
        (true, false) => PrependScheme::First,
    };
    inner.with_normalizer(None::<NormalizerWrapper>)?;
    inner.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', scheme, false)));
    let mut steps: Vec<DecoderWrapper> =
        vec![Replace::new("\u{2581}", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(Decoders::new(steps)));
    Ok(())
}

/// The parts of `tokenizer.json` where the library panics instead of refusing: at any fault of the JSON inside a decoder, and at a
/// SentencePiece normalizer whose table is broken.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Delicate {
    normalizer: Option<Value>,
    #[serde(rename = "decoder")]
    _decoder: Option<Value>,
}

/// Reads these parts beforehand.
fn refuse_delicate(bytes: &[u8]) -> std::result::Result<(), String> {
    let parts: Delicate = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let mut waiting = vec![parts.normalizer.as_ref()];
    while let Some(normalizer) = waiting.pop() {
        let Some(normalizer) = normalizer else { continue };
        if normalizer.get("type").is_some_and(|kind| kind == "Precompiled") {
            spm_precompiled::Precompiled::deserialize(normalizer)
                .map_err(|e| format!("normalizer Precompiled: {e}"))?;
        }
        waiting.extend(normalizer.get("normalizers").and_then(Value::as_array).into_iter().flatten().map(Some));
    }
    Ok(())
}

/// A JSON file's value, null if there is no such file.
pub(super) fn json(path: &Path) -> Result<Value> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::TokenizerFile {
            path: path.to_path_buf(),
            reason: format!("bad JSON: {e}; fetch the model's own file again"),
        }),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(Error::Read { path: path.to_path_buf(), source }),
    }
}

/// A token is written as its text, or as an object with the text under `content`.
fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// `eos_token_id` is one id or a list.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}
