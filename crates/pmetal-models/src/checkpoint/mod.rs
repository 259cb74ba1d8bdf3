//! A model on disk.

mod tensors;

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Shape};
use pmetal_gguf::{GgufFile, gguf_files_in};
use pmetal_ops::Weight;
use serde_json::{Value, json};

use self::tensors::{Found, Weights};
use crate::{
    DecoderSpec, Error, GenerationConfig, Result,
    config::read_object,
    dispatcher::holder,
    gguf_config,
    names::{EMBEDDING, HEAD, LAYERS},
    override_rope_scaling, resize_table,
    safetensors_folder::SafetensorsFolder,
    spec_of, tensors_of, text_config,
};

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A model on disk: a Hugging Face folder, a GGUF file, or a folder around one GGUF file.
///
/// Opening reads and checks the configuration and the tensors' headers, not their data. The files must not change while it is open.
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    spec: DecoderSpec,
    generation: GenerationConfig,
    weights: Weights,
    resized: Option<Resized>,
    text_module: Option<&'static str>,
}

/// A vocabulary that differs from the one stored.
struct Resized {
    stored_rows: usize,
    /// Ids whose rows start anew.
    fresh: Vec<u32>,
}

impl Checkpoint {
    /// Opens a model.
    ///
    /// # Errors
    /// Where there is no model, a file is truncated or broken, the architecture is not known, or tensors are missing, of the wrong shape, or
    /// without a place in the architecture.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            if path.join(CONFIG).exists() {
                return Self::open_folder(path);
            }
            return match only_gguf_in(path)? {
                Some(file) => Self::open_gguf(path, &file),
                None => Err(not_a_model(path)),
            };
        }
        if !path.exists() {
            return Err(Error::NotFound { path: path.to_path_buf() });
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            return Self::open_gguf(path, path);
        }
        Err(Error::NotAModel { path: path.to_path_buf(), found: "a file of another kind".into() })
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let config_path = folder.join(CONFIG);
        let whole = read_object(&config_path)?;
        let text = text_config(&whole).map_err(|e| e.at(&config_path))?;
        let mut spec = spec_of(&text).map_err(|e| e.at(&config_path))?;
        let Some(mut weights) = SafetensorsFolder::open(folder, &text)? else { return Err(not_a_model(folder)) };
        if let Cow::Owned(_) = text {
            let left_out = weights.keep_text_part();
            if left_out > 0 {
                tracing::warn!(path = %folder.display(), "the text part alone is used: {left_out} tensors of other parts stay out");
            }
        }
        let text_module = match &text {
            Cow::Owned(_) => holder(&whole).and_then(|(_, holder)| holder.text_module),
            Cow::Borrowed(_) => None,
        };
        let mut config = text.into_owned();
        if spec.tie_word_embeddings && has_its_own_head(&weights) {
            spec.tie_word_embeddings = false;
            config["tie_word_embeddings"] = json!(false);
        }
        let generation_path = folder.join(GENERATION_CONFIG);
        let generation = if generation_path.exists() { Some(read_object(&generation_path)?) } else { None };
        let generation =
            GenerationConfig::read(generation.as_ref().map(|json| (json, &*generation_path)), (&config, &config_path))?;
        let checkpoint = Self {
            path: folder.to_path_buf(),
            config,
            spec,
            generation,
            weights: Weights::Folder(weights),
            resized: None,
            text_module,
        };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    fn open_gguf(path: &Path, file: &Path) -> Result<Self> {
        let gguf = GgufFile::open(file)?;
        let config = gguf_config::standard(gguf.hf_config()?);
        let spec = spec_of(&config).map_err(|e| e.at(file))?;
        let mut generation = GenerationConfig::read(None, (&config, file))?;
        let ends: Vec<u32> = gguf.special_tokens()?.end_of_generation.iter().map(|token| token.id).collect();
        if !ends.is_empty() {
            generation.eos_token_ids = ends;
        }
        let names = gguf.hf_tensors()?.into_iter().map(|(name, _)| name).collect();
        let weights = Weights::Gguf { file: Box::new(gguf), path: file.to_path_buf(), names };
        let checkpoint =
            Self { path: path.to_path_buf(), config, spec, generation, weights, resized: None, text_module: None };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The decoder.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The configuration under Hugging Face's keys; a GGUF file's metadata are translated.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Of a model whose text part this is, what precedes the names of the decoder's modules, in place of `model.`: see [`crate::Holder`].
    pub fn text_module(&self) -> Option<&'static str> {
        self.text_module
    }

    /// How the model wants to be sampled from, and where it stops.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The GGUF file, which also holds the tokenizer and the chat template; none for a folder of safetensors.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.weights {
            Weights::Gguf { file, .. } => Some(file),
            Weights::Folder(_) => None,
        }
    }

    /// Every tensor of the decoder by its Hugging Face name, in the order of [`tensors_of`].
    ///
    /// # Errors
    /// As for [`tensors_of`].
    pub fn tensors(&self) -> Result<Vec<(String, Shape)>> {
        tensors_of(&self.spec)
    }

    /// Gives the model a vocabulary of `rows` ids: its embedding and its head are cut, or longer. Their new rows, and those of the ids
    /// `fresh`, are the mean of the others; see [`crate::resize_table`].
    pub fn resize_vocabulary(&mut self, rows: usize, fresh: &[u32]) {
        self.resized = Some(Resized { stored_rows: self.stored_rows(), fresh: fresh.to_vec() });
        self.spec.vocab_size = rows;
        self.config["vocab_size"] = json!(rows);
    }

    /// Gives the model another scaling of rope than its configuration states; see [`crate::override_rope_scaling`].
    ///
    /// # Errors
    /// Where `text` is no scaling, or the architecture has no use for it.
    pub fn override_rope_scaling(&mut self, text: &str) -> Result<()> {
        override_rope_scaling(&mut self.config, text)?;
        self.spec = spec_of(&self.config)?;
        Ok(())
    }

    fn stored_rows(&self) -> usize {
        self.resized.as_ref().map_or(self.spec.vocab_size, |resized| resized.stored_rows)
    }

    /// The dtype to compute in unless something else is asked for: that of the matrices, bf16 where they are mixed or quantized.
    pub fn stored_dtype(&self) -> DType {
        self.common_dtype().unwrap_or(DType::BF16)
    }

    /// The dtype of every matrix, where they share one that is a plain number.
    fn common_dtype(&self) -> Option<DType> {
        let mut dtypes: Box<dyn Iterator<Item = Option<DType>>> = match &self.weights {
            Weights::Folder(folder) => {
                Box::new(folder.iter().filter(|(_, entry)| entry.shape.rank() > 1).map(|(_, entry)| entry.dtype()))
            }
            Weights::Gguf { file, .. } => {
                let matrices = file.tensors().iter().filter(|tensor| tensor.shape.len() > 1);
                Box::new(matrices.map(|tensor| plain_dtype(tensor.block_type())))
            }
        };
        let first = dtypes.next()??;
        dtypes.all(|dtype| dtype == Some(first)).then_some(first)
    }

    /// Bytes of the weights computed with in `dtype` on the CPU: of those that stay in their mapped files, and of those that are copied, as
    /// matrices of bf16 are when they are packed.
    ///
    /// # Errors
    /// As for [`tensors_of`].
    pub fn weight_bytes(&self, dtype: DType) -> Result<(u64, u64)> {
        let half = self.common_dtype().filter(|&stored| stored != DType::F32);
        let (mut mapped, mut copied) = (0, 0);
        for (name, shape) in self.tensors()? {
            let numbers = shape.elem_count() as u64;
            let stored = match &self.weights {
                Weights::Folder(folder) => {
                    let way = self.weights.way(&self.spec, &name);
                    let piece = way.as_ref().and_then(|stored| stored.pieces.first());
                    piece.and_then(|piece| folder.get(&piece.name)?.dtype())
                }
                Weights::Gguf { .. } => None,
            };
            let stays = |stored| matches!(stored, DType::BF16 | DType::F16) || stored == dtype;
            match stored.filter(|&stored| shape.rank() > 1 && stays(stored)) {
                Some(DType::BF16) if name != EMBEDDING || self.spec.tie_word_embeddings => copied += numbers * 2,
                Some(stored) => mapped += numbers * stored.size_in_bytes() as u64,
                None => copied += numbers * half.unwrap_or(dtype).size_in_bytes() as u64,
            }
        }
        Ok((mapped, copied))
    }

    /// A weight as it is stored, but for a vocabulary that was resized; a quantized one decoded into `dtype`.
    pub(crate) fn weight(&self, name: &str, shape: &Shape, dtype: DType) -> Result<Weight> {
        let Some(Resized { stored_rows, fresh }) = self.resized.as_ref().filter(|_| is_table(name)) else {
            return self.stored_weight(name, shape, dtype);
        };
        let stored = self.stored_weight(name, &(*stored_rows, self.spec.hidden_size).into(), dtype)?;
        let table = resize_table(&stored.tensor()?, self.spec.vocab_size, fresh)?;
        self.release(name);
        Ok(Weight::Frozen(table))
    }

    fn stored_weight(&self, name: &str, shape: &Shape, dtype: DType) -> Result<Weight> {
        let half = self.gguf().and_then(|_| self.common_dtype()).filter(|&stored| stored != DType::F32);
        let missing = || Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            expected: shape.dims().to_vec(),
        };
        let stored = self.weights.way(&self.spec, name).ok_or_else(missing)?;
        self.weights.read(&stored, half.unwrap_or(dtype))
    }

    /// Lets go of a weight's pages in the file, once it has been copied.
    pub(crate) fn release(&self, name: &str) {
        if let Some(stored) = self.weights.way(&self.spec, name) {
            self.weights.release(&stored);
        }
    }

    /// Every tensor of the decoder is there in its shape, and no other is.
    fn check_tensors(&self) -> Result<()> {
        let found: HashMap<String, Found> = self.weights.found()?.into_iter().collect();
        let (family, layers, dtype) =
            (&self.spec.model_type, self.spec.num_hidden_layers(), self.stored_dtype().as_str());
        tracing::debug!(path = %self.path.display(), family, layers, dtype, tensors = found.len(), "opened model");
        let mut used = HashSet::new();
        for (tensor, shape) in self.tensors()? {
            let Some(stored) = self.weights.way(&self.spec, &tensor) else {
                let expected = shape.dims().to_vec();
                return Err(Error::MissingTensor { path: self.path.clone(), tensor, expected });
            };
            for (piece, expected) in stored.shapes(shape.dims()) {
                let Some(f) = found.get(&piece.name) else { continue };
                used.insert(piece.name.clone());
                if f.dims == expected {
                    continue;
                }
                if let (true, [rows, width]) = (is_table(&tensor), f.dims)
                    && expected.ends_with(&[*width])
                {
                    return Err(self.other_vocabulary(&tensor, *rows));
                }
                let (path, tensor, found) = (f.path.into(), piece.name.clone(), f.dims.to_vec());
                return Err(Error::TensorShape { path, tensor, expected, found });
            }
        }
        let extra = found.into_iter().filter(|(name, _)| !used.contains(name) && !self.is_ignored(name));
        match extra.min_by(|a, b| a.0.cmp(&b.0)) {
            None => Ok(()),
            Some((tensor, f)) => {
                Err(Error::ExtraTensor { path: f.path.into(), tensor, model_type: self.spec.model_type.clone() })
            }
        }
    }

    /// The error for a table whose rows are not as many as the configuration says.
    fn other_vocabulary(&self, tensor: &str, rows: usize) -> Error {
        let path = if self.gguf().is_none() { self.path.join(CONFIG) } else { self.path.clone() };
        let reason = format!(
            "is {}, but {tensor} has {rows} rows; the files are of two models, or vocab_size has to be {rows}",
            self.spec.vocab_size
        );
        Error::Config { path, key: "vocab_size".into(), reason }
    }

    /// Tensors that files carry and the decoder has no use for: frequencies of rope, layers that predict further tokens, the copy
    /// of a tied head.
    fn is_ignored(&self, name: &str) -> bool {
        let layer = name.strip_prefix(LAYERS).and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
        name.ends_with("rotary_emb.inv_freq")
            || layer.is_some_and(|layer| layer >= self.spec.num_hidden_layers())
            || (name == HEAD && self.spec.tie_word_embeddings)
    }
}

/// Whether a tensor has a row for each id of the vocabulary.
fn is_table(name: &str) -> bool {
    name == EMBEDDING || name == HEAD
}

/// Whether a file holds a head that differs from the embedding.
fn has_its_own_head(folder: &SafetensorsFolder) -> bool {
    let (Some(head), Some(embedding)) = (folder.get(HEAD), folder.get(EMBEDDING)) else { return false };
    let same = head.stored == embedding.stored && head.bytes() == embedding.bytes();
    head.release();
    !same
}

/// The dtype of a block type that is a plain number.
fn plain_dtype(block_type: &str) -> Option<DType> {
    match block_type {
        "F32" => Some(DType::F32),
        "F16" => Some(DType::F16),
        "BF16" => Some(DType::BF16),
        _ => None,
    }
}

fn names_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(pmetal_core::Error::io("read", folder))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}

fn only_gguf_in(folder: &Path) -> Result<Option<PathBuf>> {
    let mut files = gguf_files_in(folder).map_err(pmetal_core::Error::io("read", folder))?;
    if files.len() > 1 {
        let found = format!("{} .gguf files: name one of them", files.len());
        return Err(Error::NotAModel { path: folder.to_path_buf(), found });
    }
    Ok(files.pop())
}

fn not_a_model(folder: &Path) -> Error {
    let names = names_in(folder).unwrap_or_default();
    let names: Vec<_> = names.iter().filter_map(|path| path.file_name()?.to_str()).take(8).collect();
    let found = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    Error::NotAModel { path: folder.to_path_buf(), found }
}
