use std::{fs, io::ErrorKind, path::Path};

use serde_json::Value;

use super::folder::json;
use crate::error::{Error, Result};

/// The template for chatting.
const DEFAULT: &str = "default";
/// Others stand in this folder, each in a file of its name.
const MORE: &str = "additional_chat_templates";

/// One of a model's chat templates.
#[derive(Debug, Clone)]
pub(super) struct NamedTemplate {
    /// `default`, `tool_use`, `rag`.
    pub(super) name: String,
    /// Where it comes from.
    pub(super) origin: String,
    /// The Jinja text.
    pub(super) source: String,
}

impl NamedTemplate {
    pub(super) fn default_of(origin: String, source: String) -> Self {
        Self { name: DEFAULT.to_string(), origin, source }
    }
}

/// The templates of a folder, the default one first. Files of their own come before `tokenizer_config.json`, and that before
/// the `chat_template.json` of image models.
pub(super) fn read(folder: &Path, config: &Value) -> Result<Vec<NamedTemplate>> {
    let mut found = files(folder)?;
    for name in ["tokenizer_config.json", "chat_template.json"] {
        if found.is_empty() {
            let path = folder.join(name);
            let other;
            let value = if name == "tokenizer_config.json" {
                config
            } else {
                other = json(&path)?;
                &other
            };
            found = listed(&path, value.get("chat_template"))?;
        }
    }
    found.sort_by_key(|template| template.name != DEFAULT);
    Ok(found)
}

/// `chat_template.jinja`, and those in the folder of named ones.
fn files(folder: &Path) -> Result<Vec<NamedTemplate>> {
    let mut found = Vec::new();
    let own = folder.join("chat_template.jinja");
    match fs::read_to_string(&own) {
        Ok(source) => found.push(NamedTemplate::default_of(own.display().to_string(), source)),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Read { path: own, source }),
    }
    let more = folder.join(MORE);
    let entries = match fs::read_dir(&more) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(found),
        Err(source) => return Err(Error::Read { path: more, source }),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(|source| Error::Read { path: more.clone(), source })?.path());
    }
    paths.sort();
    for path in paths.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "jinja")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let source = fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        found.push(NamedTemplate { name, origin: path.display().to_string(), source });
    }
    Ok(found)
}

/// `chat_template` is the template, or named ones: a list, or an object by name.
fn listed(path: &Path, value: Option<&Value>) -> Result<Vec<NamedTemplate>> {
    let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_string);
    match value {
        Some(Value::String(source)) => Ok(vec![NamedTemplate::default_of(path.display().to_string(), source.clone())]),
        Some(Value::Array(entries)) => {
            entries.iter().map(|entry| named(path, text(entry, "name"), text(entry, "template"))).collect()
        }
        Some(Value::Object(entries)) => entries
            .iter()
            .map(|(name, source)| named(path, Some(name.clone()), source.as_str().map(str::to_string)))
            .collect(),
        _ => Ok(Vec::new()),
    }
}

fn named(path: &Path, name: Option<String>, source: Option<String>) -> Result<NamedTemplate> {
    let (Some(name), Some(source)) = (name, source) else {
        return Err(broken(path, "an entry of chat_template is not a name and a template, both text"));
    };
    // It becomes the name of a file.
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
        return Err(broken(path, &format!("the template name {name:?} is not made of letters, digits, _ and -")));
    }
    Ok(NamedTemplate { name, origin: path.display().to_string(), source })
}

fn broken(path: &Path, reason: &str) -> Error {
    Error::TokenizerFile { path: path.to_path_buf(), reason: reason.to_string() }
}

/// Writes each to the file `transformers` and mlx-lm look for it in.
pub(super) fn write(folder: &Path, templates: &[NamedTemplate]) -> Result<()> {
    for template in templates {
        let path = if template.name == DEFAULT {
            folder.join("chat_template.jinja")
        } else {
            let more = folder.join(MORE);
            fs::create_dir_all(&more).map_err(|source| Error::Write { path: more.clone(), source })?;
            more.join(format!("{}.jinja", template.name))
        };
        fs::write(&path, &template.source).map_err(|source| Error::Write { path: path.clone(), source })?;
    }
    Ok(())
}
