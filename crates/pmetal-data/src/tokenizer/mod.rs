//! Text to token ids and back.

mod folder;
mod merges;
mod pieces;
mod stream;
mod template_files;

use std::{collections::HashSet, fs, path::Path};

use pmetal_gguf::GgufFile;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Encoding};

use crate::error::{Error, Result};
use pieces::Pieces;
pub use stream::StreamDecoder;
use template_files::NamedTemplate;

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
    pieces: Pieces,
    /// The one for chatting first.
    chat_templates: Vec<NamedTemplate>,
    /// What else `tokenizer_config.json` says.
    config: Map<String, Value>,
}

impl Tokenizer {
    /// Opens the tokenizer of a model: a folder in Hugging Face's layout, a GGUF file, or a folder around one.
    ///
    /// Of a folder it reads `tokenizer.json`, `tokenizer_config.json`, `added_tokens.json`, `special_tokens_map.json`, the
    /// template files and, for the ids that end a text, `generation_config.json` and `config.json`. As transformers 5 does, it
    /// adds the tokens that only those files have, lets `LlamaTokenizer` treat spaces in its own way, and takes what is put
    /// around a plain text from `tokenizer.json` alone, whatever `add_bos_token` says.
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
            if tokenizer.chat_templates.is_empty() {
                tokenizer.chat_templates = models.chat_templates;
            }
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
        let template = file.chat_template()?;
        let template = template.map(|source| NamedTemplate::default_of(path.display().to_string(), source.to_string()));
        let eos = tokens.end_of_generation.iter().map(|token| token.id).collect();
        let inner = match file.tokenizer() {
            Err(pmetal_gguf::Error::MissingKey { key, .. }) if key == GGUF_TOKENS => {
                return Err(Error::NoTokenizer { path: path.to_path_buf() });
            }
            found => found?,
        };
        Self::assemble(inner, special, eos, template.into_iter().collect(), path)
    }

    fn assemble(
        mut inner: tokenizers::Tokenizer,
        special: Vec<(String, String)>,
        more_eos: Vec<u32>,
        chat_templates: Vec<NamedTemplate>,
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
        let pieces = Pieces::of(&inner);
        Ok(Self { inner, special, special_set, eos, adds_bos, pieces, chat_templates, config: Map::new() })
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
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if self.pieces == Pieces::Joined {
            return self.inner.decode(ids, true).map_err(failed);
        }
        let mut bytes = Vec::new();
        for &id in ids {
            self.pieces.append(&self.inner, id, &mut bytes);
        }
        self.pieces.strip_start(&mut bytes);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Decodes ids one at a time, as they are generated; special tokens are left out.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
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
        self.pieces = Pieces::of(&self.inner);
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
        let own = NamedTemplate::default_of("the run's chat template".to_string(), source.to_string());
        match self.chat_templates.first_mut() {
            Some(first) => *first = own,
            None => self.chat_templates.push(own),
        }
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and the chat templates' files, from which `transformers` and mlx-lm make the
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
        template_files::write(folder, &self.chat_templates)
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
        self.chat_templates.first().map(|template| (template.origin.as_str(), template.source.as_str()))
    }

    /// The model's template of its own for conversations with tools, the one named `tool_use`.
    pub(crate) fn tool_template(&self) -> Option<(&str, &str)> {
        let named = self.chat_templates.iter().find(|template| template.name == "tool_use");
        named.map(|template| (template.origin.as_str(), template.source.as_str()))
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

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenize { reason: error.to_string() }
}
