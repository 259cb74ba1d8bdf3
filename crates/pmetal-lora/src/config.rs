//! The settings of an adapter, in PEFT's words.

use std::{path::Path, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, ModulesToSave, Result};

/// Which linear layers get an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum TargetModules {
    /// Every linear layer of attention and MLP; not the head.
    #[default]
    AllLinear,
    /// Layers whose dotted name is one of these or ends in `.` and one of these: `q_proj`, `layers.3.mlp.up_proj`.
    Names(Vec<String>),
}

impl TargetModules {
    /// Whether the layer of this dotted name is meant.
    pub fn matches(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Names(names) => names.iter().any(|n| names_module(n, module)),
        }
    }
}

/// Whether `target` names the layer, as PEFT compares them.
pub(crate) fn names_module(target: &str, module: &str) -> bool {
    module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

impl From<String> for TargetModules {
    fn from(list: String) -> Self {
        if list == "all-linear" {
            return Self::AllLinear;
        }
        Self::Names(list.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect())
    }
}

impl From<TargetModules> for String {
    fn from(targets: TargetModules) -> Self {
        match targets {
            TargetModules::AllLinear => "all-linear".into(),
            TargetModules::Names(names) => names.join(","),
        }
    }
}

impl FromStr for TargetModules {
    type Err = std::convert::Infallible;

    fn from_str(list: &str) -> Result<Self, Self::Err> {
        Ok(list.to_owned().into())
    }
}

impl std::fmt::Display for TargetModules {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&String::from(self.clone()))
    }
}

/// A higher rank than any layer has is a slip, and its tensors would not fit into memory.
const MAX_RANK: usize = 65_536;

/// Settings of a LoRA adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Share of the input's elements zeroed in training, in `[0, 1)`.
    pub lora_dropout: f64,
    /// Which layers.
    pub target_modules: TargetModules,
    /// Scale by `alpha / sqrt(r)` instead of `alpha / r` (Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023).
    pub use_rslora: bool,
    /// Which tables are trained in full beside it.
    #[serde(default)]
    pub modules_to_save: ModulesToSave,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            use_rslora: false,
            modules_to_save: ModulesToSave::default(),
        }
    }
}

impl LoraConfig {
    /// The factor on the low-rank product.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Refuses settings outside their range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |key, got: String, expected| Err(Error::Setting { key, got, expected });
        if !(1..=MAX_RANK).contains(&self.r) {
            return refuse("lora_r", self.r.to_string(), "from 1 to 65536");
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            return refuse("lora_alpha", self.lora_alpha.to_string(), "a positive number");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return refuse("lora_dropout", self.lora_dropout.to_string(), "at least 0 and below 1");
        }
        Ok(())
    }

    /// The content of `adapter_config.json`, for the layers `modules` of the model the user named `base`.
    pub fn to_peft(&self, base: &str, modules: &[String]) -> Value {
        let targets: Vec<&str> = match &self.target_modules {
            TargetModules::AllLinear => last_parts(modules),
            TargetModules::Names(names) if modules.iter().all(|m| self.target_modules.matches(m)) => {
                names.iter().map(String::as_str).collect()
            }
            // what PEFT matched as a regular expression: the layers themselves
            TargetModules::Names(_) => modules.iter().map(String::as_str).collect(),
        };
        let alpha = if self.lora_alpha.fract() == 0.0 {
            Value::from(self.lora_alpha as i64)
        } else {
            Value::from(self.lora_alpha)
        };
        serde_json::json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.r,
            "lora_alpha": alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": if self.modules_to_save.is_empty() { None } else { Some(self.modules_to_save.names()) },
            "use_dora": false,
        })
    }

    /// Reads the content of `adapter_config.json`; what it asks for and is not done here is refused by name.
    pub fn from_peft(json: &Value, path: &Path) -> Result<Self> {
        let broken = |reason: String| Error::broken(path, format!("{reason}; restore the adapter's own file"));
        let get = |key: &str| json.get(key).filter(|v| !v.is_null());
        match get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            _ => return Err(broken(format!("peft_type is {}, expected \"LORA\"", shown(json.get("peft_type"))))),
        }
        refuse_unsupported(json, path)?;
        let number = |key: &str, default: f64| match get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().ok_or_else(|| broken(format!("{key} is {v}, expected a number"))),
        };
        let r = get("r").and_then(Value::as_u64).ok_or_else(|| broken("r is missing or no whole number".into()))?;
        let target_modules = match get("target_modules") {
            Some(Value::String(s)) if s == "all-linear" => TargetModules::AllLinear,
            Some(Value::String(s)) => TargetModules::Names(vec![s.clone()]),
            Some(Value::Array(names)) => {
                TargetModules::Names(names.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            }
            other => return Err(broken(format!("target_modules is {}, expected a list of names", shown(other)))),
        };
        let config = Self {
            r: r as usize,
            lora_alpha: number("lora_alpha", 8.0)?,
            lora_dropout: number("lora_dropout", 0.0)?,
            target_modules,
            use_rslora: match get("use_rslora") {
                None => false,
                Some(v) => v.as_bool().ok_or_else(|| broken(format!("use_rslora is {v}, expected true or false")))?,
            },
            modules_to_save: modules_to_save(get("modules_to_save"), path)?,
        };
        config.validate().map_err(|e| broken(e.to_string()))?;
        Ok(config)
    }
}

fn modules_to_save(list: Option<&Value>, path: &Path) -> Result<ModulesToSave> {
    let mut modules = ModulesToSave::default();
    let refuse =
        |found: &Value| Error::Unsupported { path: path.to_path_buf(), what: format!("modules_to_save = {found}") };
    let names = list.map_or(Some(&[][..]), |list| list.as_array().map(Vec::as_slice));
    for name in names.ok_or_else(|| refuse(list.unwrap_or(&Value::Null)))? {
        if !name.as_str().is_some_and(|name| modules.add(name)) {
            return Err(refuse(name));
        }
    }
    Ok(modules)
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("missing".into(), Value::to_string)
}

fn refuse_unsupported(json: &Value, path: &Path) -> Result<()> {
    let harmless = |key: &str, v: &Value| match key {
        "bias" => v == "none",
        _ => match v {
            Value::Null | Value::Bool(false) => true,
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            _ => false,
        },
    };
    let watched = [
        "bias",
        "fan_in_fan_out",
        "use_dora",
        "use_qalora",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "layers_to_transform",
    ];
    for key in watched {
        if let Some(value) = json.get(key).filter(|v| !harmless(key, v)) {
            return Err(Error::Unsupported { path: path.to_path_buf(), what: format!("{key} = {value}") });
        }
    }
    Ok(())
}

/// The distinct last parts of dotted names, in order of appearance.
pub(crate) fn last_parts(modules: &[String]) -> Vec<&str> {
    let mut parts: Vec<&str> = Vec::new();
    for module in modules {
        let last = module.rsplit('.').next().unwrap_or(module);
        if !parts.contains(&last) {
            parts.push(last);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_match_whole_parts_of_names() {
        let targets: TargetModules = "q_proj, layers.1.mlp.up_proj".parse().unwrap();
        assert!(targets.matches("model.layers.0.self_attn.q_proj"));
        assert!(targets.matches("model.layers.1.mlp.up_proj"));
        assert!(!targets.matches("model.layers.11.mlp.up_proj"));
        assert!(!targets.matches("model.layers.0.self_attn.my_q_proj"));
    }

    #[test]
    fn scales_of_lora_and_rslora() {
        let lora = LoraConfig { r: 16, lora_alpha: 32.0, ..Default::default() };
        assert_eq!(lora.scale(), 2.0);
        assert_eq!(LoraConfig { use_rslora: true, ..lora }.scale(), 8.0);
    }

    #[test]
    fn layers_that_peft_chose_by_a_pattern_are_saved_by_their_names() {
        let modules = ["model.layers.0.self_attn.q_proj".to_owned(), "model.layers.1.self_attn.q_proj".to_owned()];
        let mut json = LoraConfig::default().to_peft("base", &modules);
        assert_eq!(json["target_modules"], serde_json::json!(["q_proj"]));
        json["target_modules"] = ".*self_attn.(q|v)_proj".into();
        let again = LoraConfig::from_peft(&json, Path::new("c")).unwrap().to_peft("base", &modules);
        assert_eq!(again["target_modules"], serde_json::json!(modules));
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        let mut json = LoraConfig::default().to_peft("base", &["a.q_proj".into()]);
        assert_eq!(LoraConfig::from_peft(&json, Path::new("c")).unwrap().r, 16);
        json["use_dora"] = true.into();
        let error = LoraConfig::from_peft(&json, Path::new("c")).unwrap_err().to_string();
        assert!(error.contains("use_dora = true"), "{error}");
    }
}
