use std::{path::PathBuf, sync::OnceLock};

use candle_core::{DType, Device};
use pmetal_data::{CacheChoice, Dataset, DatasetOptions, Message, Source, Template, TemplateChoice, Tokenizer};
use pmetal_gguf::GgufFile;
use pmetal_lora::{AdapterFile, Use, attach_file};
use pmetal_models::{CausalLMModel, Checkpoint, load};

use crate::scratch::Scratch;

/// A function of bytes, and the folder of its seeds in `fuzz/corpus`.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// Every target there is.
pub fn targets() -> [Target; 7] {
    [
        ("safetensors", safetensors),
        ("config", config),
        ("gguf", gguf),
        ("jsonl", jsonl),
        ("template", template),
        ("tokenizer", tokenizer),
        ("adapter", adapter),
    ]
}

/// The model whose files stand around the damaged one: llama, one layer, 16 ids.
const CONFIG: &[u8] = include_bytes!("../../../fuzz/corpus/config/llama.json");
const WEIGHTS: &[u8] = include_bytes!("../../../fuzz/corpus/safetensors/llama.safetensors");
const ADAPTER_CONFIG: &[u8] = include_bytes!("../../../fuzz/corpus/adapter/adapter_config.json");
const ADAPTER: &[u8] = include_bytes!("../../../fuzz/corpus/adapter/adapter_model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("../../../fuzz/corpus/tokenizer/bytes.json");

/// Ids the small model knows.
const VOCAB_SIZE: usize = 16;
/// What tokenizers are given to read: several scripts, digits, blanks, a special token.
const TEXT: &str = "Hello  wörld 12345 ไทย 中文 \u{1f9f6}<|im_end|>\n\n\tx = 'aaaaaaaaaaaaaaaaaaaaaaaa';";

/// `model.safetensors` of a folder.
pub fn safetensors(bytes: &[u8]) -> bool {
    open_folder(&[("config.json", CONFIG), ("model.safetensors", bytes)]).is_some()
}

/// `config.json`: as a description of a model, and beside the weights of one.
pub fn config(bytes: &[u8]) -> bool {
    let _ = open_folder(&[("config.json", bytes), ("model.safetensors", WEIGHTS)]);
    serde_json::from_slice(bytes).is_ok_and(|config| pmetal_models::spec_of(&config).is_ok())
}

/// Opens a folder of these files and loads its model.
fn open_folder(files: &[(&str, &[u8])]) -> Option<Box<dyn CausalLMModel>> {
    let folder = Scratch::new();
    for (name, bytes) in files {
        folder.write(name, bytes);
    }
    let checkpoint = Checkpoint::open(folder.path()).ok()?;
    load(&checkpoint, DType::F32, &Device::Cpu, None).ok()
}

/// A GGUF file: all that it can be asked for itself, as a model, and as a tokenizer.
pub fn gguf(bytes: &[u8]) -> bool {
    let folder = Scratch::new();
    let path = folder.write("model.gguf", bytes);
    let Ok(file) = GgufFile::open(&path) else { return false };
    let _ = file.hf_config();
    let _ = file.chat_template();
    for tensor in file.tensors() {
        let _ = file.dequantize(&tensor.name, DType::F32);
    }
    for (name, _) in file.hf_tensors().unwrap_or_default() {
        let _ = file.hf_tensor(&name, DType::BF16);
    }
    let _ = Checkpoint::open(&path).map(|checkpoint| load(&checkpoint, DType::F32, &Device::Cpu, None).map(drop));
    if let Ok(tokenizer) = Tokenizer::from_model_path(&path) {
        read(&tokenizer);
        let _ = Template::choose(&TemplateChoice::Auto, &tokenizer).and_then(|template| render(&template));
    }
    true
}

/// Rows of text or ids.
pub fn jsonl(bytes: &[u8]) -> bool {
    static TOOLS: OnceLock<(Tokenizer, Template)> = OnceLock::new();
    let (tokenizer, template) = TOOLS.get_or_init(|| {
        let tokenizer = small_tokenizer();
        let template = Template::choose(&TemplateChoice::Auto, &tokenizer).expect("the built-in templates");
        (tokenizer, template)
    });
    let folder = Scratch::new();
    let path = folder.write("rows.jsonl", bytes);
    let options = DatasetOptions {
        cache: CacheChoice::Temporary,
        ..DatasetOptions::new(template.clone(), tokenizer.vocab_size())
    };
    Source::find(&path).and_then(|source| Dataset::load(&source.into(), tokenizer, &options, &mut ())).is_ok()
}

/// A chat template, with messages of every role.
pub fn template(bytes: &[u8]) -> bool {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(small_tokenizer);
    let folder = Scratch::new();
    let path: PathBuf = folder.write("chat_template.jinja", bytes);
    let template = Template::choose(&TemplateChoice::File(path), tokenizer);
    template.and_then(|template| render(&template)).is_ok()
}

fn render(template: &Template) -> pmetal_data::Result<String> {
    let messages = [("system", "Be brief."), ("user", "Hi?"), ("assistant", "<think>x</think>Ho."), ("user", "So?")];
    template.render(&messages.map(|(role, content)| Message::new(role, content)), true)
}

/// `tokenizer.json`, with text to read and ids to write.
pub fn tokenizer(bytes: &[u8]) -> bool {
    let folder = Scratch::new();
    folder.write("tokenizer.json", bytes);
    let Ok(tokenizer) = Tokenizer::from_model_path(folder.path()) else { return false };
    read(&tokenizer);
    true
}

fn read(tokenizer: &Tokenizer) {
    let _ = tokenizer.encode(TEXT, true);
    let _ = tokenizer.encode("", true);
    let ids: Vec<u32> = (0..40).collect();
    let _ = tokenizer.decode(&ids);
    let mut stream = tokenizer.stream();
    for id in ids {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
}

/// The tokenizer of the seeds.
fn small_tokenizer() -> Tokenizer {
    let folder = Scratch::new();
    folder.write("tokenizer.json", TOKENIZER);
    Tokenizer::from_model_path(folder.path()).expect("the seed is a tokenizer")
}

/// An adapter: the bytes as its configuration, as its tensors, and as the single file with both.
pub fn adapter(bytes: &[u8]) -> bool {
    let mut taken = false;
    for files in [
        &[("adapter_config.json", bytes), ("adapter_model.safetensors", ADAPTER)][..],
        &[("adapter_config.json", ADAPTER_CONFIG), ("adapter_model.safetensors", bytes)],
        &[("lora_weights.safetensors", bytes)],
    ] {
        let folder = Scratch::new();
        for (name, bytes) in files {
            folder.write(name, bytes);
        }
        let Ok(file) = AdapterFile::open(folder.path()) else { continue };
        let mut model = open_folder(&[("config.json", CONFIG), ("model.safetensors", WEIGHTS)]).expect("a good model");
        assert_eq!(model.spec().vocab_size, VOCAB_SIZE);
        taken |= attach_file(model.as_mut(), &file, Use::Inference).is_ok();
        let _ = attach_file(model.as_mut(), &file, Use::Training);
    }
    taken
}
