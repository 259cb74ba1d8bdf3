//! Another scaling than the configuration states.

use serde_json::{Map, Value, json};

use crate::{Error, ROPE_SCALING_KINDS, Result};

/// Kinds that a factor alone describes.
const BY_FACTOR: [&str; 3] = ["dynamic", "linear", "yarn"];
/// What stays of the settings that are replaced.
const KEPT: [&str; 2] = ["rope_theta", "partial_rotary_factor"];

/// Replaces the scaling of rope in a configuration: `text` is `yarn:4`, `linear:2`, `dynamic:2`, `none`, or a JSON object as
/// `rope_scaling` would be. The base and the share of a head that turns stay. Where layers have their own settings, those of full attention
/// change. Where the scaling stretches the context by a factor, `max_position_embeddings` grows with it.
///
/// # Errors
/// [`Error::RopeScaling`] where the text is none of these.
pub fn override_rope_scaling(config: &mut Value, text: &str) -> Result<()> {
    let mut scaling = parse(text)?;
    let text_part = config.get("text_config").is_some_and(Value::is_object);
    let config = if text_part { config.get_mut("text_config") } else { Some(config) };
    let Some(Value::Object(config)) = config else { return Ok(()) };
    stretch(config, &mut scaling);
    let target = target(config);
    for key in KEPT {
        if let Some(value) = target.get(key) {
            scaling.entry(key).or_insert_with(|| value.clone());
        }
    }
    *target = Value::Object(scaling);
    Ok(())
}

fn parse(text: &str) -> Result<Map<String, Value>> {
    let refuse = |reason: String| Error::RopeScaling { text: text.to_owned(), reason };
    let known = |kind: &str| ROPE_SCALING_KINDS.contains(&kind);
    let unknown = |kind: &str| refuse(format!("the kind {kind} is not one of {}", ROPE_SCALING_KINDS.join(", ")));
    let text = text.trim();
    if text == "none" {
        return Ok(Map::from_iter([("rope_type".to_owned(), json!("default"))]));
    }
    if text.starts_with('{') {
        let mut object: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| refuse(format!("is no JSON object: {e}")))?;
        let kind = object.remove("type");
        let kind = object.get("rope_type").cloned().or(kind);
        let Some(kind) = kind.as_ref().and_then(Value::as_str) else {
            return Err(refuse(format!("has no rope_type: give one of {}", ROPE_SCALING_KINDS.join(", "))));
        };
        if !known(kind) {
            return Err(unknown(kind));
        }
        object.insert("rope_type".into(), json!(kind));
        return Ok(object);
    }
    let (kind, factor) = text.split_once(':').unwrap_or((text, ""));
    if !known(kind) {
        return Err(unknown(kind));
    }
    if !BY_FACTOR.contains(&kind) {
        let example = format!("{{\"rope_type\": \"{kind}\", ...}}");
        return Err(refuse(format!("{kind} has more settings than a factor: give a JSON object, {example}")));
    }
    let factor = factor.parse().ok().filter(|factor: &f64| factor.is_finite() && *factor > 0.0);
    let Some(factor) = factor else { return Err(refuse(format!("expected {kind}:FACTOR, as in {kind}:4"))) };
    Ok(Map::from_iter([("rope_type".to_owned(), json!(kind)), ("factor".to_owned(), json!(factor))]))
}

/// Lets the context grow by the factor from the length that the factor refers to, which the settings then name: left out, it would be the
/// grown one. Dynamic scaling refers to the context itself.
fn stretch(config: &mut Map<String, Value>, scaling: &mut Map<String, Value>) {
    const CONTEXT: &str = "max_position_embeddings";
    const ORIGINAL: &str = "original_max_position_embeddings";
    let stretches = ["linear", "llama3", "yarn"].map(|kind| scaling.get("rope_type") == Some(&json!(kind)));
    let factor = scaling.get("factor").and_then(Value::as_f64).filter(|_| stretches.contains(&true));
    let (Some(factor), Some(context)) = (factor, config.get(CONTEXT).and_then(Value::as_u64)) else { return };
    if scaling.get("rope_type") != Some(&json!("linear")) {
        scaling.entry(ORIGINAL).or_insert_with(|| json!(context));
    }
    let original = scaling.get(ORIGINAL).and_then(Value::as_u64).unwrap_or(context);
    let stretched = (original as f64 * factor) as u64;
    config.insert(CONTEXT.into(), json!(context.max(stretched)));
}

/// The settings in force, or where new ones belong.
fn target(config: &mut Map<String, Value>) -> &mut Value {
    let filled = |value: Option<&Value>| value.and_then(Value::as_object).is_some_and(|object| !object.is_empty());
    if filled(config.get("rope_scaling")) || !filled(config.get("rope_parameters")) {
        return config.entry("rope_scaling").or_insert(Value::Null);
    }
    let settings = config.entry("rope_parameters").or_insert(Value::Null);
    let by_layer = settings.as_object().is_some_and(|settings| settings.values().any(Value::is_object));
    if by_layer { &mut settings["full_attention"] } else { settings }
}
