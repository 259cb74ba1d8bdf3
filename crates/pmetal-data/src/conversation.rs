use serde_json::{Map, Value};

/// One message of a conversation: the object a chat template sees, with at least `role`.
#[derive(Debug, Clone, PartialEq)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A message of text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let pairs = [("role", role.into()), ("content", content.into())];
        Self(pairs.map(|(key, text): (_, String)| (key.to_string(), Value::String(text))).into_iter().collect())
    }

    /// A message with further keys a template may read, as `tool_calls`.
    pub(crate) fn from_object(object: Map<String, Value>) -> Self {
        Self(object)
    }

    /// Adds or replaces a key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_string(), value.into());
    }

    /// `user`, `assistant`, `system`, ...
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The text, unless the message has none (an assistant that only calls tools).
    pub(crate) fn content(&self) -> Option<&str> {
        self.0.get("content").and_then(Value::as_str)
    }

    /// The keys and values.
    pub fn object(&self) -> &Map<String, Value> {
        &self.0
    }
}

/// Messages in order, and the tools a template may describe to the model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// Who said what.
    pub messages: Vec<Message>,
    /// A JSON array of tool descriptions.
    pub tools: Option<Value>,
}
