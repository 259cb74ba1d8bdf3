use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::{Error, Result};

/// Rotary factors of Llama 3.1 and later, one divisor per frequency.
const FACTORS: &str = "rope_freqs";

impl Config<'_> {
    /// `rope_scaling`; what the architecture adds is not in it.
    pub(crate) fn rope_scaling(&self) -> Result<Value> {
        if let Some(factors) = self.table(FACTORS)? {
            return Ok(json!({"rope_type": "pmetal_factors", "factors": factors}));
        }
        // Files of 2023 have the linear factor alone, under a key of its own.
        let old_factor = self.float("rope.scale_linear")?.filter(|&factor| factor != 1.0);
        let kind = self.string("rope.scaling.type")?.unwrap_or(if old_factor.is_some() { "linear" } else { "none" });
        let factor = || match self.float("rope.scaling.factor")?.or(old_factor) {
            Some(factor) => Ok(factor),
            None => self.missing("rope.scaling.factor"),
        };
        match kind {
            "none" => Ok(Value::Null),
            "linear" => Ok(json!({"rope_type": "linear", "factor": factor()?})),
            "yarn" => self.yarn(factor()?),
            other => Err(Error::Unknown {
                path: self.file.path.clone(),
                what: "rope scaling",
                found: other.to_string(),
                known: "none, linear, yarn".to_string(),
            }),
        }
    }

    fn yarn(&self, factor: f64) -> Result<Value> {
        let mut scaling = Map::new();
        scaling.insert("rope_type".into(), json!("yarn"));
        scaling.insert("factor".into(), json!(factor));
        let original = self.count("rope.scaling.original_context_length")?;
        scaling.insert("original_max_position_embeddings".into(), json!(original));
        for (key, name) in [
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
            ("rope.scaling.yarn_attn_factor", "attention_factor"),
        ] {
            if let Some(number) = self.float(key)? {
                scaling.insert(name.into(), json!(number));
            }
        }
        Ok(Value::Object(scaling))
    }

    /// Adds to `rope_scaling` where that is yarn.
    pub(crate) fn add_to_yarn(&mut self, name: &str, value: Value) {
        if let Some(Value::Object(scaling)) = self.map.get_mut("rope_scaling")
            && scaling.get("rope_type").is_some_and(|kind| kind == "yarn")
        {
            scaling.insert(name.to_string(), value);
        }
    }
}
