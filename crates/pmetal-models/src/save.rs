//! A model as a Hugging Face folder.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use pmetal_ops::Weight;
use serde_json::{Map, Value, json};

use crate::{CausalLMModel, Error, Result, dispatcher::family_of};

/// A weight's name, itself, and its bytes once saved.
type Saved = (String, Weight, u64);

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
    let size = dtype.size_in_bytes() as u64;
    let weights = model.named_weights().into_iter();
    let weights = weights.map(|(name, weight)| {
        let bytes = weight.shape().elem_count() as u64 * size;
        (name, weight, bytes)
    });
    let shards = into_shards(weights.collect(), max_shard_bytes);
    if let [only] = shards.as_slice() {
        return write_shard(&dir.join("model.safetensors"), only, dtype);
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_shard(&dir.join(&file), shard, dtype)?;
        weight_map.extend(shard.iter().map(|(name, ..)| (name.clone(), json!(file))));
    }
    let total: u64 = shards.iter().flatten().map(|(_, _, bytes)| bytes).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_json(&dir.join("model.safetensors.index.json"), &index)
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
        if filled > 0 && filled + saved.2 > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += saved.2;
        if let Some(shard) = shards.last_mut() {
            shard.push(saved);
        }
    }
    shards
}

/// The safetensors container: the header's length (u64, little-endian), the header (JSON, padded to 8 bytes), the tensors.
fn write_shard(path: &Path, shard: &[Saved], dtype: DType) -> Result<()> {
    let stored = match dtype {
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        _ => "F32",
    };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for (name, weight, bytes) in shard {
        let entry = json!({ "dtype": stored, "shape": weight.shape().dims(), "data_offsets": [start, start + bytes] });
        header.insert(name.clone(), entry);
        start += bytes;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let io = || pmetal_core::Error::io("write", path);
    let mut file = BufWriter::new(File::create(path).map_err(io())?);
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(io())?;
    for (_, weight, _) in shard {
        file.write_all(&bytes_of(weight, dtype)?).map_err(io())?;
    }
    Ok(file.into_inner().map_err(|e| io()(e.into_error()))?.sync_all().map_err(io())?)
}

/// A weight's elements in `dtype`, row-major and little-endian. A trained one is saved from its f32 master.
fn bytes_of(weight: &Weight, dtype: DType) -> Result<Vec<u8>> {
    let tensor: Tensor = match weight.param() {
        Some(param) => param.master().clone(),
        None => weight.tensor()?,
    };
    let flat = tensor.to_dtype(dtype)?.flatten_all()?;
    Ok(match dtype {
        DType::BF16 => flat.to_vec1::<bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => flat.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let text = format!("{json:#}\n");
    Ok(fs::write(path, text).map_err(pmetal_core::Error::io("write", path))?)
}
