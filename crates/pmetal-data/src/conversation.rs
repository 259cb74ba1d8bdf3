use serde_json::{Map, Value};

/// One message of a conversation: the object a chat template sees, with at least `role`.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    object: Map<String, Value>,
    /// Where the assistant says it: whether it is trained.
    trained: bool,
}

impl Message {
    /// A message of text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        let pairs = [("role", role.into()), ("content", content.into())];
        let object = pairs.map(|(key, text): (_, String)| (key.to_string(), Value::String(text))).into_iter().collect();
        Self { object, trained: true }
    }

    /// A message with further keys a template may read, as `tool_calls`.
    pub(crate) fn from_object(object: Map<String, Value>) -> Self {
        Self { object, trained: true }
    }

    /// Adds or replaces a key.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.object.insert(key.to_string(), value.into());
    }

    /// Takes a key away.
    pub(crate) fn remove(&mut self, key: &str) {
        self.object.shift_remove(key);
    }

    /// Says whether an assistant's message is trained; nobody else's ever is.
    pub(crate) fn set_trained(&mut self, trained: bool) {
        self.trained = trained || self.role() != "assistant";
    }

    /// Whether it may be trained: false for an answer with `weight` 0, `train` false, or within a prompt.
    pub(crate) fn trained(&self) -> bool {
        self.trained
    }

    /// `user`, `assistant`, `system`, ...
    pub fn role(&self) -> &str {
        self.object.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// The keys and values.
    pub fn object(&self) -> &Map<String, Value> {
        &self.object
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

impl Conversation {
    /// Whether there are tools to describe.
    pub(crate) fn has_tools(&self) -> bool {
        self.tools
            .as_ref()
            .is_some_and(|tools| tools.as_array().is_none_or(|list| !list.is_empty()) && !tools.is_null())
    }
}
