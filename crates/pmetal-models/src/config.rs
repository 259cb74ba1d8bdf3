//! `config.json` without the weights beside it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::DType;
use serde_json::Value;

use crate::{Error, Result};

/// Reads a `config.json`, given itself or its folder.
///
/// # Errors
/// Where there is none, or it is no JSON object.
pub fn read_config(path: &Path) -> Result<Value> {
    let path: PathBuf = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    read_object(&path)
}

/// Reads a file that holds one JSON object.
pub(crate) fn read_object(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(pmetal_core::Error::io("read", path))?;
    let json: Value = serde_json::from_slice(&text).map_err(|e| match pmetal_core::what_it_is(&text) {
        Some(kind) => Error::broken(path, format!("is {kind}")),
        None => Error::broken(path, format!("is no JSON: {e}; restore the model's own file")),
    })?;
    if json.is_object() {
        Ok(json)
    } else {
        Err(Error::broken(path, "expected an object; restore the model's own file"))
    }
}

/// The dtype a configuration names, under today's key or the old one.
pub fn dtype_of(config: &Value) -> Option<DType> {
    match config.get("dtype").or_else(|| config.get("torch_dtype")).and_then(Value::as_str)? {
        "bfloat16" => Some(DType::BF16),
        "float16" => Some(DType::F16),
        "float32" => Some(DType::F32),
        _ => None,
    }
}

/// Dropout of the model itself that a configuration asks for in training, by key: there is none here, but for that of adapters.
pub fn unused_dropout(config: &Value) -> Vec<(&'static str, f64)> {
    let stated = ["attention_dropout", "resid_pdrop", "embd_pdrop"].into_iter().map(|key| (key, config[key].as_f64()));
    stated.filter_map(|(key, p)| Some((key, p.filter(|&p| p != 0.0)?))).collect()
}
