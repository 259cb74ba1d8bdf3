//! Which forms of a message a template can read. `transformers` hands messages over as they are, and a template that does not
//! know a form drops it, fails, or writes Python's notation of it; here it gets the form it knows.

use minijinja::{Value as Rendered, value::Serde};
use serde_json::{Map, Value, json};

use super::{ChatTemplate, Prepared, python_json::Style};
use crate::conversation::{Conversation, Message};

/// What a template reads, learnt by rendering probes; what a template knows is handed to it as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reads {
    /// A content that is a string.
    text: bool,
    /// A content that is a list of parts.
    parts: bool,
    /// Reasoning among the parts.
    thoughts: bool,
    /// Arguments of a call that are an object.
    objects: bool,
    /// Arguments of a call that are a string of JSON.
    strings: bool,
}

/// As `transformers` does it: everything as it is.
const AS_IT_IS: Reads = Reads { text: true, parts: true, thoughts: true, objects: true, strings: true };

const WORD: &str = "Kestrel";
const OTHER: &str = "Wagon";

impl Reads {
    /// Renders probes. Of a template that refuses them nothing is known, and messages stay as they are.
    pub(super) fn learn(template: &ChatTemplate) -> Self {
        let shown = |messages: Vec<Value>| {
            let tool = json!([{"type": "function", "function": {"name": "f", "description": "", "parameters":
                {"type": "object", "properties": {"x": {"type": "string", "description": ""}}, "required": []}}}]);
            let objects = messages.into_iter().filter_map(|message| match message {
                Value::Object(object) => Some(Message::from_object(object)),
                _ => None,
            });
            let conversation = Conversation { messages: objects.collect(), tools: Some(tool) };
            let prepared = Prepared::with(AS_IT_IS, &conversation);
            template.render_messages(&prepared, prepared.messages(), false).ok()
        };
        let user = |content: Value| json!({"role": "user", "content": content});
        let Some(text) = shown(vec![user(WORD.into())]) else { return AS_IT_IS };
        let has = |rendered: Option<String>, words: &[&str], notation: &[&str]| {
            rendered.is_some_and(|text| {
                words.iter().all(|word| text.contains(word)) && !notation.iter().any(|part| text.contains(part))
            })
        };
        let part = |text: &str| json!({"type": "text", "text": text});
        let notation = ["'type': 'text'", "\"type\": \"text\"", "'type': 'thinking'", "\"type\": \"thinking\""];
        let parts = has(shown(vec![user(json!([part(WORD)]))]), &[WORD], &notation);
        let thought = json!([{"type": "thinking", "thinking": WORD}, part(OTHER)]);
        let thoughts = parts
            && has(
                shown(vec![user("x".into()), json!({"role": "assistant", "content": thought})]),
                &[WORD, OTHER],
                &notation,
            );
        let call = |arguments: Value| {
            let call =
                json!([{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}]);
            shown(vec![user("y".into()), json!({"role": "assistant", "content": "", "tool_calls": call})])
        };
        let objects = has(call(json!({"x": WORD})), &[WORD], &["'x': "]);
        let strings = has(call(format!("{{\"x\": \"{WORD}\"}}").into()), &["{\"x\": \"Kestrel\"}"], &[]);
        let calls = if objects || strings { (objects, strings) } else { (true, true) };
        Self { text: text.contains(WORD) || !parts, parts, thoughts, objects: calls.0, strings: calls.1 }
    }

    /// The message with its content and the arguments of its calls in forms the template reads: parts become their texts,
    /// one per line, or a text becomes a part; arguments become an object, or a string of JSON as Python writes it.
    pub(super) fn adapt(self, message: &Map<String, Value>) -> Map<String, Value> {
        let mut message = message.clone();
        match message.get("content") {
            Some(Value::Array(parts)) => {
                let thinks =
                    |part: &&Value| part.get("type").is_some_and(|kind| kind == "thinking" || kind == "reasoning");
                let apart = !self.parts || (!self.thoughts && parts.iter().any(|part| thinks(&part)));
                if apart {
                    let join =
                        |parts: Vec<&Value>| parts.into_iter().filter_map(text_of).collect::<Vec<_>>().join("\n");
                    let (thoughts, texts): (Vec<&Value>, Vec<&Value>) = parts.iter().partition(thinks);
                    let (thought, text) = (join(thoughts), join(texts));
                    message.insert("content".to_string(), text.into());
                    if !thought.is_empty() {
                        message.entry("reasoning_content").or_insert(thought.into());
                    }
                }
            }
            Some(Value::String(text)) if !self.text => {
                let part = json!([{"type": "text", "text": text}]);
                message.insert("content".to_string(), part);
            }
            _ => {}
        }
        if let (Some(Value::Array(calls)), false) = (message.get_mut("tool_calls"), self.objects && self.strings) {
            for call in calls {
                if let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) {
                    self.adapt_arguments(arguments);
                }
            }
        }
        message
    }

    fn adapt_arguments(self, arguments: &mut Value) {
        match arguments {
            Value::String(text) if !self.strings => {
                if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                    *arguments = object;
                }
            }
            Value::Object(_) if !self.objects => {
                let python = Style { ensure_ascii: false, indent: None, item: ", ", key: ": ", sort_keys: false };
                if let Ok(text) = python.dump(&Rendered::from(Serde(&*arguments))) {
                    *arguments = text.into();
                }
            }
            _ => {}
        }
    }
}

/// The text of a part; Mistral's reasoning is a list of parts itself.
fn text_of(part: &Value) -> Option<String> {
    let value = ["text", "thinking", "reasoning"].iter().find_map(|key| part.get(*key))?;
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => Some(parts.iter().filter_map(text_of).collect::<Vec<_>>().join("\n")),
        _ => None,
    }
}
