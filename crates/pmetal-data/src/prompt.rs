use serde_json::Value;

use crate::{
    conversation::Conversation,
    error::RowFault,
    row::{Row, keys, kind},
};

/// What a model is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A text to continue.
    Text(String),
    /// A conversation to answer.
    Conversation(Conversation),
}

impl Prompt {
    /// Reads a row of a file of prompts: a string, an object with the text under `prompt`, or a conversation under `messages` (or
    /// `prompt`), with what is to be answered as its last turn.
    ///
    /// # Errors
    /// When it is none of these, or the conversation is malformed or ends with what a model said.
    pub fn parse(value: Value) -> Result<Self, RowFault> {
        let mut object = match value {
            Value::String(text) => return Ok(Self::Text(text)),
            Value::Object(object) => object,
            other => return Err(RowFault::NotObject(kind(&other))),
        };
        match object.shift_remove("prompt") {
            Some(Value::String(text)) => return Ok(Self::Text(text)),
            Some(turns @ Value::Array(_)) => {
                object.insert("messages".to_string(), turns);
            }
            Some(other) => {
                let expected = "a string or an array of turns";
                return Err(RowFault::WrongKind { key: "'prompt'".into(), expected, found: kind(&other) });
            }
            None if object.contains_key("messages") || object.contains_key("conversations") => {}
            None => return Err(RowFault::NoPrompt { seen: keys(&object) }),
        }
        let seen = keys(&object);
        let Row::Conversation(conversation) = Row::parse(Value::Object(object))? else {
            return Err(RowFault::NoPrompt { seen });
        };
        match conversation.messages.last().map(|message| message.role()) {
            Some("user" | "tool") => Ok(Self::Conversation(conversation)),
            role => Err(RowFault::NothingToAnswer { role: role.unwrap_or_default().to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::conversation::Message;

    #[test]
    fn texts_and_conversations() {
        let text = Prompt::Text("Hi".into());
        assert_eq!(Prompt::parse(json!("Hi")).unwrap(), text);
        assert_eq!(Prompt::parse(json!({"id": 3, "prompt": "Hi"})).unwrap(), text);
        let turns = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]);
        let messages = vec![Message::new("system", "s"), Message::new("user", "Hi")];
        let asked = Prompt::Conversation(Conversation { messages, tools: Some(json!([{"type": "function"}])) });
        for key in ["messages", "prompt"] {
            let row = json!({key: turns, "tools": [{"type": "function"}]});
            assert_eq!(Prompt::parse(row).unwrap(), asked);
        }
        let tool = json!({"messages": [{"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "4"}]});
        assert!(matches!(Prompt::parse(tool), Ok(Prompt::Conversation(c)) if c.messages.len() == 3));
    }

    #[test]
    fn what_asks_nothing_says_so() {
        let fault = |row| Prompt::parse(row).unwrap_err().to_string();
        assert_eq!(fault(json!(7)), "expected a JSON object, found a number");
        assert_eq!(fault(json!({"prompt": 7})), "'prompt' is a number, expected a string or an array of turns");
        let unknown = fault(json!({"text": "x", "id": 1}));
        assert!(unknown.contains("[text, id]") && unknown.contains("prompt (a text"), "{unknown}");
        let answered = json!({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]});
        assert!(fault(answered).starts_with("the last turn is by 'assistant'"));
        assert_eq!(fault(json!({"messages": []})), "'messages' is empty");
    }
}
