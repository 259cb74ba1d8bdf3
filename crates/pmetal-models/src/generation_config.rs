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
    /// Reads `generation_config.json`, where there is one. The end tokens are those of `config.json` where it names none.
    pub(crate) fn read(generation: Option<&Value>, config: &Value) -> Result<Self> {
        let from_model = || Keys::new(config).ids("eos_token_id");
        let Some(generation) = generation else {
            return Ok(Self { eos_token_ids: from_model()?.unwrap_or_default(), ..Self::default() });
        };
        let keys = Keys::new(generation);
        let whole = |key| Ok::<_, crate::Error>(keys.whole(key)?.map(|n| n as usize));
        Ok(Self {
            eos_token_ids: keys.ids("eos_token_id")?.map_or_else(from_model, |ids| Ok(Some(ids)))?.unwrap_or_default(),
            do_sample: keys.boolean("do_sample")?,
            temperature: keys.number("temperature")?,
            top_k: whole("top_k")?,
            top_p: keys.number("top_p")?,
            min_p: keys.number("min_p")?,
            repetition_penalty: keys.number("repetition_penalty")?,
            max_new_tokens: whole("max_new_tokens")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn end_tokens_come_from_the_generation_config_first() {
        let config = json!({"eos_token_id": 2});
        let ends =
            |generation: Option<Value>| GenerationConfig::read(generation.as_ref(), &config).unwrap().eos_token_ids;
        assert_eq!(ends(None), [2]);
        assert_eq!(ends(Some(json!({"temperature": 0.6}))), [2]);
        assert_eq!(ends(Some(json!({"eos_token_id": [7, 8]}))), [7, 8]);
        assert!(GenerationConfig::read(Some(&json!({"eos_token_id": "x"})), &config).is_err());
    }
}
