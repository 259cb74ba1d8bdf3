//! The settings of an adapter, in PEFT's words.

use std::{collections::BTreeMap, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, ModulesToSave, Result};

/// Which linear layers get an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum TargetModules {
    /// Every linear layer of attention, MLP and experts that a gradient reaches; not the router, not the head.
    #[default]
    AllLinear,
    /// Layers whose dotted name is one of these or ends in `.` and one of these: `q_proj`, `layers.3.mlp.up_proj`. Where experts once were modules of
    /// their own, the names of their projections, `gate_proj` and so on, stand for the experts alone, as in PEFT.
    Names(Vec<String>),
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
    /// Other ranks, of the layers whose names end so.
    #[serde(default)]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other numerators, likewise.
    #[serde(default)]
    pub alpha_pattern: BTreeMap<String, f64>,
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
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

impl LoraConfig {
    /// The factor on the low-rank product of layers that no pattern names.
    pub fn scale(&self) -> f32 {
        self.scale_of(self.r, self.lora_alpha)
    }

    /// The factor on a product of rank `r`.
    pub(crate) fn scale_of(&self, r: usize, alpha: f64) -> f32 {
        let r = r as f64;
        (alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Rank and numerator of a layer; `joined` doubles what no pattern names, for a matrix that was two.
    pub(crate) fn rank_and_alpha(&self, layer: &str, joined: bool) -> (usize, f64) {
        let times = if joined { 2 } else { 1 };
        let r = by_pattern(&self.rank_pattern, layer).unwrap_or(self.r * times);
        (r, by_pattern(&self.alpha_pattern, layer).unwrap_or(self.lora_alpha * times as f64))
    }

    /// Refuses settings outside their range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |key, got: String, expected| Err(Error::Setting { key, got, expected });
        let is_alpha = |alpha: f64| alpha.is_finite() && alpha > 0.0;
        if !(1..=MAX_RANK).contains(&self.r) {
            return refuse("lora_r", self.r.to_string(), "from 1 to 65536");
        }
        if !is_alpha(self.lora_alpha) {
            return refuse("lora_alpha", self.lora_alpha.to_string(), "a positive number");
        }
        if let Some((name, r)) = self.rank_pattern.iter().find(|(_, r)| !(1..=MAX_RANK).contains(*r)) {
            return refuse("rank_pattern", format!("{r} for {name}"), "from 1 to 65536");
        }
        if let Some((name, alpha)) = self.alpha_pattern.iter().find(|(_, alpha)| !is_alpha(**alpha)) {
            return refuse("alpha_pattern", format!("{alpha} for {name}"), "positive numbers");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return refuse("lora_dropout", self.lora_dropout.to_string(), "at least 0 and below 1");
        }
        Ok(())
    }

    /// The content of `adapter_config.json`, for modules and parameters that PEFT knows by these names in the model the user named `base`.
    pub fn to_peft(&self, base: &str, modules: &[String], parameters: &[String]) -> Value {
        let whole = |x: f64| if x.fract() == 0.0 { Value::from(x as i64) } else { Value::from(x) };
        let alphas = self.alpha_pattern.iter().map(|(name, &alpha)| (as_pattern(name), whole(alpha)));
        let ranks = self.rank_pattern.iter().map(|(name, &r)| (as_pattern(name), Value::from(r)));
        serde_json::json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.r,
            "lora_alpha": whole(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": modules,
            "target_parameters": if parameters.is_empty() { None } else { Some(parameters) },
            "rank_pattern": ranks.collect::<serde_json::Map<_, _>>(),
            "alpha_pattern": alphas.collect::<serde_json::Map<_, _>>(),
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
            // experts are parameters, which the tensors themselves name
            None if get("target_parameters").is_some() => TargetModules::Names(Vec::new()),
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
            rank_pattern: patterns("rank_pattern", json, path, |v| v.as_u64().map(|r| r as usize))?,
            alpha_pattern: patterns("alpha_pattern", json, path, Value::as_f64)?,
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
        "lora_bias",
        "layer_replication",
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

/// The last part of a dotted name.
pub(crate) fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn by_pattern<T: Copy>(patterns: &BTreeMap<String, T>, layer: &str) -> Option<T> {
    patterns.iter().find(|(name, _)| names_module(name, layer)).map(|(_, &value)| value)
}

/// PEFT's regular expression for layers whose names end in `.` and `name`.
fn as_pattern(name: &str) -> String {
    format!(r".*\.{}", name.replace('.', r"\."))
}

/// `rank_pattern` or `alpha_pattern`. PEFT's keys are regular expressions for the ends of names; those that are more than names are refused.
fn patterns<T>(
    key: &'static str,
    json: &Value,
    path: &Path,
    number: impl Fn(&Value) -> Option<T>,
) -> Result<BTreeMap<String, T>> {
    let refuse = |what| Error::Unsupported { path: path.to_path_buf(), what: format!("{key} = {what}") };
    let Some(value) = json.get(key).filter(|value| !value.is_null()) else { return Ok(BTreeMap::new()) };
    let entry = |(pattern, value): (&String, &Value)| {
        let name = pattern.strip_prefix(r".*\.").unwrap_or(pattern).replace(r"\.", ".");
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "._-".contains(c));
        let number = number(value).filter(|_| is_name).ok_or_else(|| refuse(format!("{{{pattern:?}: {value}}}")))?;
        Ok((name, number))
    };
    value.as_object().ok_or_else(|| refuse(value.to_string()))?.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_match_whole_parts_of_names() {
        assert!(names_module("q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(names_module("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"));
        assert!(!names_module("layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"));
        assert!(!names_module("q_proj", "model.layers.0.self_attn.my_q_proj"));
    }

    #[test]
    fn patterns_give_layers_ranks_and_scales_of_their_own() {
        let mut json = LoraConfig { r: 2, lora_alpha: 4.0, ..Default::default() }.to_peft("base", &[], &[]);
        json["rank_pattern"] = serde_json::json!({ r".*\.experts\.gate_up_proj": 6, "q_proj": 3 });
        json["alpha_pattern"] = serde_json::json!({ "q_proj": 1.5 });
        let config = LoraConfig::from_peft(&json, Path::new("c")).unwrap();
        let of = |layer, joined| config.rank_and_alpha(layer, joined);
        assert_eq!(of("model.layers.0.mlp.experts.gate_up_proj", true), (6, 8.0));
        assert_eq!(of("model.layers.0.self_attn.q_proj", false), (3, 1.5));
        assert_eq!(of("model.layers.0.self_attn.my_q_proj", false), (2, 4.0));
        assert_eq!(LoraConfig::from_peft(&config.to_peft("base", &[], &[]), Path::new("c")).unwrap(), config);
        for pattern in ["(q|k)_proj", "q.*", ""] {
            json["rank_pattern"] = serde_json::json!({ pattern: 3 });
            let error = LoraConfig::from_peft(&json, Path::new("c")).unwrap_err().to_string();
            assert!(error.contains("rank_pattern"), "{error}");
        }
    }

    #[test]
    fn scales_of_lora_and_rslora() {
        let lora = LoraConfig { r: 16, lora_alpha: 32.0, ..Default::default() };
        assert_eq!(lora.scale(), 2.0);
        assert_eq!(LoraConfig { use_rslora: true, ..lora }.scale(), 8.0);
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        let mut json = LoraConfig::default().to_peft("base", &["a.q_proj".into()], &[]);
        assert_eq!(LoraConfig::from_peft(&json, Path::new("c")).unwrap().r, 16);
        json["use_dora"] = true.into();
        let error = LoraConfig::from_peft(&json, Path::new("c")).unwrap_err().to_string();
        assert!(error.contains("use_dora = true"), "{error}");
    }
}
