use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use pmetal_gguf::{GgufFile, gguf_files_in};
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Encoding};

use crate::error::{Error, Result};

/// The variables under which chat templates know special tokens, as `tokenizer_config.json` names them.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What [`Tokenizer::save`] writes; a template only where there is one.
pub const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// Where a GGUF file with a tokenizer has its tokens.
const GGUF_TOKENS: &str = "tokenizer.ggml.tokens";

/// Text to token ids and back, with what a model's files say about its special tokens and its chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: Vec<(String, String)>,
    special_set: HashSet<String>,
    eos: Vec<u32>,
    adds_bos: bool,
    /// Where it comes from, and the Jinja text.
    chat_template: Option<(String, String)>,
    /// What else `tokenizer_config.json` says.
    config: Map<String, Value>,
}

impl Tokenizer {
    /// Opens the tokenizer of a model: a folder in Hugging Face's layout, a GGUF file, or a folder around one.
    ///
    /// Of a folder it reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and,
    /// for the ids that end a text, `generation_config.json` and `config.json`. Like `transformers`, it takes what is put
    /// around a plain text from `tokenizer.json` alone.
    ///
    /// # Errors
    /// When the path is neither, `tokenizer.json` is missing, or a file is broken.
    pub fn from_model_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let kind = fs::metadata(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
        if kind.is_dir() { Self::from_folder(path) } else { Self::from_gguf(path) }
    }

    /// The tokenizer of a model, `None` for one without: rows of ids need none.
    ///
    /// # Errors
    /// As [`Tokenizer::from_model_path`], but for a missing tokenizer.
    pub fn find(path: impl AsRef<Path>) -> Result<Option<Self>> {
        match Self::from_model_path(path) {
            Err(Error::NoTokenizer { .. }) => Ok(None),
            found => found.map(Some),
        }
    }

    /// The tokenizer to use with an adapter, given as its folder or its single file: the one beside the adapter where there is one,
    /// whose vocabulary may be larger, with the ids that end a text of the model's and, where it has no template, the model's.
    ///
    /// # Errors
    /// As [`Tokenizer::find`].
    pub fn find_with_adapter(model: &Path, adapter: Option<&Path>) -> Result<Option<Self>> {
        let models = Self::find(model)?;
        let folder = adapter.and_then(|path| if path.is_dir() { Some(path) } else { path.parent() });
        let Some(folder) = folder.filter(|folder| folder.join(TOKENIZER_FILES[0]).is_file()) else { return Ok(models) };
        let mut tokenizer = Self::from_folder(folder)?;
        if let Some(models) = models {
            let ends: Vec<u32> = models.eos.iter().copied().filter(|id| !tokenizer.eos.contains(id)).collect();
            tokenizer.special_set.extend(ends.iter().filter_map(|&id| tokenizer.inner.id_to_token(id)));
            tokenizer.eos.extend(ends);
            tokenizer.chat_template = tokenizer.chat_template.or(models.chat_template);
        }
        Ok(Some(tokenizer))
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let tokens = file.special_tokens()?;
        let named = [
            ("bos_token", tokens.bos),
            ("eos_token", tokens.eos),
            ("unk_token", tokens.unk),
            ("pad_token", tokens.pad),
        ];
        let special = named.into_iter().filter_map(|(name, token)| Some((name.to_string(), token?.text))).collect();
        let template = file.chat_template()?.map(|source| (path.display().to_string(), source.to_string()));
        let eos = tokens.end_of_generation.iter().map(|token| token.id).collect();
        let inner = match file.tokenizer() {
            Err(pmetal_gguf::Error::MissingKey { key, .. }) if key == GGUF_TOKENS => {
                return Err(Error::NoTokenizer { path: path.to_path_buf() });
            }
            found => found?,
        };
        Self::assemble(inner, special, eos, template, path)
    }

    fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return match gguf_files_in(folder).unwrap_or_default().as_slice() {
                    [only] => Self::from_gguf(only),
                    _ => Err(Error::NoTokenizer { path: folder.to_path_buf() }),
                };
            }
            Err(source) => return Err(Error::Read { path, source }),
        };
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::TokenizerFile { path: path.clone(), reason: e.to_string() })?;
        let config_path = folder.join("tokenizer_config.json");
        let config = json(&config_path)?;
        let map = json(&folder.join("special_tokens_map.json"))?;
        let text = |name: &str| token_text(config.get(name)).or_else(|| token_text(map.get(name)));
        let special = SPECIAL_NAMES.iter().filter_map(|name| Some((name.to_string(), text(name)?))).collect();
        let mut eos = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            eos.extend(ids(json(&folder.join(name))?.get("eos_token_id")));
        }
        let own = folder.join("chat_template.jinja");
        let template = match fs::read_to_string(&own) {
            Ok(source) => Some((own.display().to_string(), source)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                config_template(&config).map(|source| (config_path.display().to_string(), source))
            }
            Err(source) => return Err(Error::Read { path: own, source }),
        };
        let mut tokenizer = Self::assemble(inner, special, eos, template, &path)?;
        if let Value::Object(config) = config {
            tokenizer.config = config;
        }
        Ok(tokenizer)
    }

    fn assemble(
        mut inner: tokenizers::Tokenizer,
        special: Vec<(String, String)>,
        more_eos: Vec<u32>,
        chat_template: Option<(String, String)>,
        path: &Path,
    ) -> Result<Self> {
        // Lengths are the dataset's business: a `tokenizer.json` saved while training may still cut or fill up.
        inner.with_padding(None);
        let broken = |e: tokenizers::Error| Error::TokenizerFile { path: path.to_path_buf(), reason: e.to_string() };
        inner.with_truncation(None).map_err(broken)?;
        let id = |name: &str| {
            let text = special.iter().find(|(known, _)| known == name).map(|(_, text)| text)?;
            inner.token_to_id(text)
        };
        let bos = id("bos_token");
        let mut eos: Vec<u32> = id("eos_token").into_iter().chain(more_eos).collect();
        let mut seen = HashSet::new();
        eos.retain(|&id| seen.insert(id) && inner.id_to_token(id).is_some());
        let empty = inner.encode_fast("", true).map_err(broken)?;
        let adds_bos = bos.is_some() && empty.get_ids().first().copied() == bos && eos.first().copied() != bos;
        let added = inner.get_added_tokens_decoder().into_values().filter(|token| token.special);
        let special_set = added.map(|t| t.content).chain(eos.iter().filter_map(|&id| inner.id_to_token(id))).collect();
        Ok(Self { inner, special, special_set, eos, adds_bos, chat_template, config: Map::new() })
    }

    /// The ids of a text. With `add_special`, what the tokenizer puts around a plain text (usually bos before it) is there.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The encoding of a rendered text with, per token, its place in the text in bytes.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<Encoding> {
        self.inner.encode(text, false).map_err(failed)
    }

    /// The text of some ids without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// Decodes ids one at a time, as they are generated; special tokens are left out.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, ids: Vec::new(), settled: 0, printed: 0 }
    }

    /// Adds tokens that are never split; `special` ones are not part of a decoded text. Returns those that are new with their ids; the
    /// others are in the vocabulary already and stay as they are.
    ///
    /// # Errors
    /// When the tokenizer refuses them.
    pub fn add_tokens(&mut self, tokens: &[String], special: bool) -> Result<Vec<(String, u32)>> {
        let mut added = Vec::new();
        for token in tokens {
            if self.inner.token_to_id(token).is_some() {
                continue;
            }
            self.inner.add_tokens([AddedToken::from(token.as_str(), special)]).map_err(failed)?;
            let id = self.inner.token_to_id(token).ok_or_else(|| failed(format!("it did not take {token}").into()))?;
            added.push((token.clone(), id));
            if special {
                self.special_set.insert(token.clone());
            }
            self.describe(token, id, special);
        }
        Ok(added)
    }

    /// Enters a token in the list that some `tokenizer_config.json` repeat the added tokens in.
    fn describe(&mut self, token: &str, id: u32, special: bool) {
        if let Some(Value::Object(listed)) = self.config.get_mut("added_tokens_decoder") {
            let entry = serde_json::json!({
                "content": token, "lstrip": false, "normalized": !special, "rstrip": false, "single_word": false, "special": special,
            });
            listed.insert(id.to_string(), entry);
        }
    }

    /// Replaces the chat template by another Jinja text.
    pub fn set_chat_template(&mut self, source: &str) {
        self.chat_template = Some(("the run's chat template".to_string(), source.to_string()));
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, from which `transformers` and mlx-lm make the
    /// same tokenizer.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|source| Error::Write { path, source })
        };
        write("tokenizer.json", &self.inner.to_string(true).map_err(failed)?)?;
        // `PreTrainedTokenizerFast` is the class every version of transformers has that takes tokenizer.json as it is.
        let mut config = Map::from_iter([("tokenizer_class".to_string(), Value::from("PreTrainedTokenizerFast"))]);
        config.extend(self.special.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str()))));
        for (key, value) in &self.config {
            if key != "chat_template" && !config.contains_key(key) {
                config.insert(key.clone(), value.clone());
            }
        }
        write("tokenizer_config.json", &format!("{:#}\n", Value::Object(config)))?;
        match &self.chat_template {
            Some((_, source)) => write("chat_template.jinja", source),
            None => Ok(()),
        }
    }

    /// Everything that decides which ids a text becomes and which of them end it, in words.
    pub(crate) fn in_words(&self) -> String {
        let vocabulary = self.inner.to_string(false).unwrap_or_default();
        format!("{vocabulary}\n{:?}\n{:?}", self.special, self.eos)
    }

    /// The id of a token given by its text, as `<|im_end|>`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of `eos_token`, or the first that ends a text by the other files of the model.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// Ids that end a text: `eos_token` first, then those of the generation config (or GGUF metadata).
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Rows that a table needs to have one for each token: one more than the highest id.
    pub fn rows(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Whether the tokenizer itself puts bos before a plain text.
    pub(crate) fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The model's own chat template: where it comes from and its Jinja text.
    pub(crate) fn chat_template(&self) -> Option<(&str, &str)> {
        self.chat_template.as_ref().map(|(origin, source)| (origin.as_str(), source.as_str()))
    }

    /// The special tokens as chat templates know them: (`bos_token`, `<s>`).
    pub(crate) fn special_texts(&self) -> &[(String, String)] {
        &self.special
    }

    /// Texts of all tokens that are not text: special ones and those that end it.
    pub(crate) fn special_set(&self) -> &HashSet<String> {
        &self.special_set
    }
}

/// Ids in, text out, without ever cutting a character: bytes wait until they are complete.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Ids before this are printed and no longer needed as context.
    settled: usize,
    /// Ids before this are printed.
    printed: usize,
}

/// Tokens a character can take at most: one for each of its bytes.
const LONGEST_CHARACTER: usize = 4;

impl StreamDecoder<'_> {
    /// The text that `id` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        let waiting = self.ids.len() - self.printed;
        if text.is_empty() || (text.ends_with(char::REPLACEMENT_CHARACTER) && waiting < LONGEST_CHARACTER) {
            return Ok(String::new());
        }
        self.settled = self.printed;
        self.printed = self.ids.len();
        Ok(text)
    }

    /// What still waits when no more ids come.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        let rest = self.pending();
        self.printed = self.ids.len();
        rest
    }

    /// The text of the ids not printed yet, in the context of those before: decoders drop the first space of a text.
    fn pending(&self) -> Result<String> {
        let recent = self.ids.get(self.settled..).unwrap_or_default();
        let context = recent.get(..self.printed - self.settled).unwrap_or_default();
        let before = self.tokenizer.decode(context)?;
        let all = self.tokenizer.decode(recent)?;
        Ok(all.strip_prefix(&before).map(str::to_string).unwrap_or_default())
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenize { reason: error.to_string() }
}

/// A JSON file's value, null if there is no such file.
fn json(path: &PathBuf) -> Result<Value> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::TokenizerFile { path: path.clone(), reason: format!("bad JSON: {e}") }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(Error::Read { path: path.clone(), source }),
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

/// `chat_template` is the template, or a list of named ones of which `default` is for chatting.
fn config_template(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
            default.or(named.first())?.get("template")?.as_str().map(str::to_string)
        }
        _ => None,
    }
}
