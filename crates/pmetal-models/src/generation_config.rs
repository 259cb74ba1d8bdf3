use std::path::Path;

use serde_json::Value;

use crate::{Result, keys::Keys};

/// How a model wants to be sampled from, as `generation_config.json` says; what it is silent about is none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Every token that ends the answer.
    pub eos_token_ids: Vec<u32>,
    /// Whether to sample at all; otherwise the most likely token is taken.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// How many of the likeliest tokens stay.
    pub top_k: Option<usize>,
    /// The probability that the likeliest tokens together must reach to stay.
    pub top_p: Option<f64>,
    /// The share of the likeliest token's probability that a token must reach to stay.
    pub min_p: Option<f64>,
    /// Makes tokens that were there already less likely.
    pub repetition_penalty: Option<f64>,
    /// The longest answer, in tokens.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads `generation_config.json`, where there is one. The end tokens are those of `config.json` where it names none. Both come with
    /// the file they were read from.
    pub(crate) fn read(generation: Option<(&Value, &Path)>, (config, config_path): (&Value, &Path)) -> Result<Self> {
        let from_model = || Keys::new(config).ids("eos_token_id").map_err(|e| e.at(config_path));
        let (read, ends) = match generation {
            Some((generation, path)) => Self::read_keys(&Keys::new(generation)).map_err(|e| e.at(path))?,
            None => (Self::default(), None),
        };
        let ends = ends.map_or_else(from_model, |ids| Ok(Some(ids)))?;
        Ok(Self { eos_token_ids: ends.unwrap_or_default(), ..read })
    }

    /// What a file says, its end tokens apart.
    fn read_keys(keys: &Keys) -> Result<(Self, Option<Vec<u32>>)> {
        let whole = |key| Ok::<_, crate::Error>(keys.whole(key)?.map(|n| n as usize));
        let read = Self {
            eos_token_ids: Vec::new(),
            do_sample: keys.boolean("do_sample")?,
            temperature: keys.number("temperature")?,
            top_k: whole("top_k")?,
            top_p: keys.number("top_p")?,
            min_p: keys.number("min_p")?,
            repetition_penalty: keys.number("repetition_penalty")?,
            max_new_tokens: whole("max_new_tokens")?,
        };
        Ok((read, keys.ids("eos_token_id")?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(generation: Option<&Value>, config: &Value) -> Result<GenerationConfig> {
        GenerationConfig::read(generation.map(|json| (json, Path::new("g.json"))), (config, Path::new("c.json")))
    }

    #[test]
    fn end_tokens_come_from_the_generation_config_first() {
        let config = json!({"eos_token_id": 2});
        let ends = |generation: Option<Value>| read(generation.as_ref(), &config).unwrap().eos_token_ids;
        assert_eq!(ends(None), [2]);
        assert_eq!(ends(Some(json!({"temperature": 0.6}))), [2]);
        assert_eq!(ends(Some(json!({"eos_token_id": [7, 8]}))), [7, 8]);
        assert!(read(Some(&json!({"eos_token_id": "x"})), &config).unwrap_err().to_string().starts_with("g.json: "));
        assert!(read(None, &json!({"eos_token_id": "x"})).unwrap_err().to_string().starts_with("c.json: "));
    }
}
