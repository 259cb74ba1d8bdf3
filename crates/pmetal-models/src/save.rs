//! A model as a Hugging Face folder.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufWriter, Write},
    ops::Range,
    path::Path,
};

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use pmetal_ops::Weight;
use serde_json::{Map, Value, json};

use crate::{
    CausalLMModel, Error, Result,
    dispatcher::family_of,
    names::stays_f32,
    stored::{in_turn, stored},
};

/// A tensor of a file, in terms of a decoder's.
struct Saved {
    name: String,
    dtype: DType,
    /// Of all parts together.
    shape: Vec<usize>,
    parts: Vec<Part>,
}

/// Rows of a decoder's tensor.
struct Part {
    weight: Weight,
    rows: Range<usize>,
    /// Whether the file has the rows of the weight's two halves in turn.
    interleaved: bool,
    transposed: bool,
}

/// Writes `config.json` and the weights in `dtype` (f32, bf16 or f16) into the folder `dir`, which is there: `model.safetensors`, or shards
/// of at most `max_shard_bytes` with their index. Tensors are converted and written one at a time.
///
/// # Errors
/// Where a file cannot be written, and where the configuration of a GGUF file has no counterpart in a `config.json`.
pub fn save_pretrained(
    model: &dyn CausalLMModel,
    config: &Value,
    dtype: DType,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<()> {
    let config = config_for(model, config, dtype)?;
    write_json(&dir.join("config.json"), &config)?;
    let shards = into_shards(file_tensors(model, dtype), max_shard_bytes);
    if let [only] = shards.as_slice() {
        return write_shard(&dir.join("model.safetensors"), only);
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_shard(&dir.join(&file), shard)?;
        weight_map.extend(shard.iter().map(|saved| (saved.name.clone(), json!(file))));
    }
    let total: u64 = shards.iter().flatten().map(Saved::bytes).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_json(&dir.join("model.safetensors.index.json"), &index)
}

/// The tensors of the files, in the order of the decoder's.
fn file_tensors(model: &dyn CausalLMModel, dtype: DType) -> Vec<Saved> {
    let (mut tensors, mut places): (Vec<Saved>, HashMap<String, usize>) = (Vec::new(), HashMap::new());
    for (name, weight) in model.named_weights() {
        let Some(way) = stored(model.spec(), &name).into_iter().next() else { continue };
        let mut start = 0;
        for (piece, shape) in way.shapes(weight.shape().dims()) {
            let rows = weight.shape().dims().first().map_or(0, |rows| rows / way.pieces.len());
            let part = Part {
                weight: weight.clone(),
                rows: start..start + rows,
                interleaved: way.interleaved,
                transposed: piece.transposed,
            };
            start += rows;
            let place = *places.entry(piece.name.clone()).or_insert_with(|| {
                let dtype = if stays_f32(&piece.name) { DType::F32 } else { dtype };
                tensors.push(Saved { name: piece.name.clone(), dtype, shape, parts: Vec::new() });
                tensors.len() - 1
            });
            if let Some(saved) = tensors.get_mut(place) {
                saved.parts.push(part);
            }
        }
    }
    tensors
}

/// The configuration with what this copy of the model is: its class, its dtype, its vocabulary, whether its head is its own.
fn config_for(model: &dyn CausalLMModel, config: &Value, dtype: DType) -> Result<Value> {
    let family = family_of(config)?;
    let refuse = |key: &str, reason: String| Error::Config { path: "config.json".into(), key: key.into(), reason };
    if config["rope_scaling"]["rope_type"] == "pmetal_factors" {
        let reason = "the frequency divisors of this GGUF file have no name in a config.json";
        return Err(refuse("rope_scaling", reason.into()));
    }
    let name = dtype_name(dtype).ok_or_else(|| refuse("dtype", format!("{dtype:?} is not f32, bf16 or f16")))?;
    let Value::Object(mut map) = config.clone() else {
        return Err(refuse("config", "expected an object".into()));
    };
    map.remove("torch_dtype");
    map.remove("quantization_config");
    map.insert("dtype".into(), json!(name));
    map.insert("architectures".into(), json!([family.architecture]));
    map.insert("model_type".into(), json!(family.model_type));
    map.insert("tie_word_embeddings".into(), json!(model.spec().tie_word_embeddings));
    map.insert("vocab_size".into(), json!(model.spec().vocab_size));
    Ok(Value::Object(map))
}

fn dtype_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float32"),
        DType::BF16 => Some("bfloat16"),
        DType::F16 => Some("float16"),
        _ => None,
    }
}

/// Fills shards in order; a tensor larger than a shard has one of its own.
fn into_shards(weights: Vec<Saved>, max_bytes: u64) -> Vec<Vec<Saved>> {
    let mut shards: Vec<Vec<Saved>> = vec![Vec::new()];
    let mut filled = 0;
    for saved in weights {
        let bytes = saved.bytes();
        if filled > 0 && filled + bytes > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(saved);
        }
    }
    shards
}

/// The safetensors container: the header's length (u64, little-endian), the header (JSON, padded to 8 bytes), the tensors.
fn write_shard(path: &Path, shard: &[Saved]) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for saved in shard {
        let (dtype, end) = (safetensors_name(saved.dtype), start + saved.bytes());
        let entry = json!({ "dtype": dtype, "shape": saved.shape, "data_offsets": [start, end] });
        header.insert(saved.name.clone(), entry);
        start = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let io = || pmetal_core::Error::io("write", path);
    let mut file = BufWriter::new(File::create(path).map_err(io())?);
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(io())?;
    for saved in shard {
        for part in &saved.parts {
            file.write_all(&part.bytes(saved.dtype)?).map_err(io())?;
        }
    }
    Ok(file.into_inner().map_err(|e| io()(e.into_error()))?.sync_all().map_err(io())?)
}

fn safetensors_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        _ => "F32",
    }
}

impl Saved {
    /// Its size in the file.
    fn bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.size_in_bytes() as u64
    }
}

impl Part {
    /// Its elements in `dtype`, row-major and little-endian. A trained weight is saved from its f32 master.
    fn bytes(&self, dtype: DType) -> Result<Vec<u8>> {
        let tensor: Tensor = match self.weight.param() {
            Some(param) => param.master().clone(),
            None => self.weight.tensor()?,
        };
        let tensor = if self.interleaved { in_turn(&tensor)? } else { tensor };
        let tensor = tensor.narrow(0, self.rows.start, self.rows.len())?;
        let tensor = if self.transposed { tensor.t()? } else { tensor };
        let flat = tensor.to_dtype(dtype)?.contiguous()?.flatten_all()?;
        Ok(match dtype {
            DType::BF16 => flat.to_vec1::<bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => flat.to_vec1::<f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => flat.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
    }
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let text = format!("{json:#}\n");
    Ok(fs::write(path, text).map_err(pmetal_core::Error::io("write", path))?)
}
