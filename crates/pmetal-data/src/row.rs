use serde_json::{Map, Value};

use crate::{
    conversation::{Conversation, Message},
    error::RowFault,
};

type Object = Map<String, Value>;
type Parsed<T> = Result<T, RowFault>;

/// One row of a dataset, in the format its keys tell.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Row {
    /// ShareGPT (`conversations`) or Messages (`messages`).
    Conversation(Conversation),
    /// `instruction`, `input`, `output`, and optionally `system` and `history`.
    Alpaca(Alpaca),
    /// `text`: trained as it is.
    Text(String),
    /// `input_ids` and optionally `labels`, -100 where a token is not trained; without them all are.
    Tokens { input_ids: Vec<u32>, labels: Option<Vec<i64>> },
}

/// A row of Alpaca's format.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Alpaca {
    system: Option<String>,
    /// Earlier turns: what the user asked, what was answered.
    history: Vec<(String, String)>,
    instruction: String,
    /// May be empty.
    input: String,
    output: String,
}

impl Alpaca {
    /// The row as a conversation: the user says instruction and, on the next line, the input if there is one. The keys
    /// `instruction` and `input` stay on that message, for Alpaca's classic prompt.
    pub(crate) fn conversation(&self) -> Conversation {
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(Message::new("system", system));
        }
        for (asked, answered) in &self.history {
            messages.extend([Message::new("user", asked), Message::new("assistant", answered)]);
        }
        let user = if self.input.is_empty() {
            Message::new("user", &self.instruction)
        } else {
            let mut user = Message::new("user", format!("{}\n{}", self.instruction, self.input));
            user.set("instruction", self.instruction.as_str());
            user.set("input", self.input.as_str());
            user
        };
        messages.extend([user, Message::new("assistant", &self.output)]);
        Conversation { messages, tools: None }
    }
}

impl Row {
    /// Finds the format by the keys and reads the row. Keys that no format knows are ignored beside those of one.
    pub(crate) fn parse(value: Value) -> Parsed<Self> {
        let mut object = match value {
            Value::Object(object) => object,
            other => return Err(RowFault::NotObject(kind(&other))),
        };
        if object.contains_key("input_ids") {
            return tokens(&object);
        }
        for key in ["messages", "conversations"] {
            if let Some(turns) = object.shift_remove(key) {
                return conversation(key, turns, &object).map(Self::Conversation);
            }
        }
        if object.contains_key("instruction") {
            return alpaca(&object).map(Self::Alpaca);
        }
        match object.shift_remove("text") {
            Some(Value::String(text)) => Ok(Self::Text(text)),
            Some(other) => Err(wrong("'text'", "a string", &other)),
            None => Err(RowFault::UnknownKeys { seen: keys(&object) }),
        }
    }
}

fn conversation(key: &'static str, turns: Value, row: &Object) -> Parsed<Conversation> {
    let turns = match turns {
        Value::Array(turns) => turns,
        other => return Err(wrong(format!("'{key}'"), "an array of turns", &other)),
    };
    let mut messages = turns.into_iter().enumerate().map(message).collect::<Parsed<Vec<_>>>()?;
    if messages.is_empty() {
        return Err(RowFault::EmptyConversation(key));
    }
    let system = optional_text(row, "system")?.filter(|text| !text.is_empty());
    if let Some(system) = system.filter(|_| messages.iter().all(|m| m.role() != "system")) {
        messages.insert(0, Message::new("system", system));
    }
    Ok(Conversation { messages, tools: tools(row)? })
}

/// `tools` is an array, or one written into a string, as datasets with a fixed schema have it.
fn tools(row: &Object) -> Parsed<Option<Value>> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map(Some).map_err(|e| RowFault::Json(format!("in 'tools': {e}")))
        }
        Some(array @ Value::Array(_)) => Ok(Some(array.clone())),
        Some(other) => Err(wrong("'tools'", "an array", other)),
    }
}

const ROLES: &str = "system, developer, user (human), assistant (gpt, model), tool (observation, function)";

fn message((turn, value): (usize, Value)) -> Parsed<Message> {
    let mut object = match value {
        Value::Object(object) => object,
        other => return Err(wrong(format!("turn {turn}"), "an object", &other)),
    };
    let (role_key, text_key) = if object.contains_key("role") { ("role", "content") } else { ("from", "value") };
    let Some(role) = object.get(role_key) else { return Err(RowFault::TurnKeys { turn, seen: keys(&object) }) };
    let Some(role) = role.as_str() else { return Err(wrong(format!("turn {turn}: '{role_key}'"), "a string", role)) };
    let role = match role {
        "user" | "human" => "user",
        "assistant" | "gpt" | "model" => "assistant",
        "tool" | "observation" | "function" => "tool",
        "system" => "system",
        "developer" => "developer",
        other => return Err(RowFault::UnknownRole { turn, role: other.to_string(), expected: ROLES }),
    };
    let calls_tools = object.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = match object.get(text_key) {
        Some(text @ Value::String(_)) => text.clone(),
        None | Some(Value::Null) if calls_tools => Value::Null,
        None => return Err(RowFault::TurnKeys { turn, seen: keys(&object) }),
        Some(other) => return Err(wrong(format!("turn {turn}: '{text_key}'"), "a string", other)),
    };
    let known = [("role".to_string(), role.into()), ("content".to_string(), content)];
    object.retain(|key, _| !["role", "content", "from", "value"].contains(&key.as_str()));
    Ok(Message::from_object(known.into_iter().chain(object).collect()))
}

fn alpaca(row: &Object) -> Parsed<Alpaca> {
    let required = |key: &'static str| optional_text(row, key)?.ok_or(RowFault::MissingKey(key));
    Ok(Alpaca {
        system: optional_text(row, "system")?.filter(|text| !text.is_empty()).map(str::to_string),
        history: history(row)?,
        instruction: required("instruction")?.to_string(),
        input: optional_text(row, "input")?.unwrap_or_default().to_string(),
        output: required("output")?.to_string(),
    })
}

fn history(row: &Object) -> Parsed<Vec<(String, String)>> {
    let rounds = match row.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(rounds)) => rounds,
        Some(other) => return Err(wrong("'history'", "an array of [question, answer] pairs", other)),
    };
    let pair = |(index, round): (usize, &Value)| match round.as_array().map(Vec::as_slice) {
        Some([Value::String(asked), Value::String(answered)]) => Ok((asked.clone(), answered.clone())),
        _ => Err(wrong(format!("'history' entry {index}"), "a pair of strings", round)),
    };
    rounds.iter().enumerate().map(pair).collect()
}

fn tokens(row: &Object) -> Parsed<Row> {
    let input_ids = integers(row, "input_ids", |id| u32::try_from(id).ok(), "a token id")?;
    let trained = |label: i64| (label == -100 || u32::try_from(label).is_ok()).then_some(label);
    let labels = match row.get("labels") {
        None | Some(Value::Null) => None,
        Some(_) => Some(integers(row, "labels", trained, "a token id or -100")?),
    };
    match &labels {
        Some(labels) if labels.len() != input_ids.len() => {
            Err(RowFault::LabelsLength { input_ids: input_ids.len(), labels: labels.len() })
        }
        _ => Ok(Row::Tokens { input_ids, labels }),
    }
}

fn integers<T>(
    row: &Object,
    key: &'static str,
    convert: impl Fn(i64) -> Option<T>,
    expected: &'static str,
) -> Parsed<Vec<T>> {
    let array = match row.get(key) {
        Some(Value::Array(array)) => array,
        Some(other) => return Err(wrong(format!("'{key}'"), "an array of integers", other)),
        None => return Err(RowFault::MissingKey(key)),
    };
    let entry = |(index, value): (usize, &Value)| {
        let id = value.as_i64().and_then(&convert);
        id.ok_or_else(|| RowFault::Id { key, index, found: value.to_string(), expected })
    };
    array.iter().enumerate().map(entry).collect()
}

fn optional_text<'a>(row: &'a Object, key: &'static str) -> Parsed<Option<&'a str>> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(format!("'{key}'"), "a string", other)),
    }
}

fn wrong(key: impl Into<String>, expected: &'static str, found: &Value) -> RowFault {
    RowFault::WrongKind { key: key.into(), expected, found: kind(found) }
}

pub(crate) fn keys(object: &Object) -> String {
    object.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn turns(row: Value) -> Vec<(String, String)> {
        let conversation = match Row::parse(row).unwrap() {
            Row::Conversation(conversation) => conversation,
            Row::Alpaca(alpaca) => alpaca.conversation(),
            other => panic!("{other:?}"),
        };
        let text = |m: &Message| (m.role().to_string(), m.content().unwrap_or("none").to_string());
        conversation.messages.iter().map(text).collect()
    }

    fn fault(row: Value) -> String {
        Row::parse(row).unwrap_err().to_string()
    }

    #[test]
    fn formats_are_found_by_their_keys() {
        let expected = [("system", "s"), ("user", "u"), ("assistant", "a")];
        let expected = expected.map(|(r, c)| (r.to_string(), c.to_string()));
        let [s, h, g] = [("system", "s"), ("human", "u"), ("gpt", "a")].map(|(r, c)| json!({"from": r, "value": c}));
        assert_eq!(turns(json!({"id": 7, "conversations": [s, h, g]})), expected);
        assert_eq!(turns(json!({"system": "s", "conversations": [h, g]})), expected);
        let messages = ["system", "user", "assistant"].map(|r| json!({"role": r, "content": &r[..1]}));
        assert_eq!(turns(json!({"messages": messages, "text": "x"})), expected);
        let row = json!({"instruction": "u", "input": "", "output": "a", "system": "s", "text": "x"});
        assert_eq!(turns(row), expected);
        assert_eq!(Row::parse(json!({"text": "t"})).unwrap(), Row::Text("t".into()));
        let row = Row::parse(json!({"input_ids": [1, 2], "labels": [-100, 2]})).unwrap();
        assert_eq!(row, Row::Tokens { input_ids: vec![1, 2], labels: Some(vec![-100, 2]) });
        let row = Row::parse(json!({"input_ids": [1, 2]})).unwrap();
        assert_eq!(row, Row::Tokens { input_ids: vec![1, 2], labels: None });
    }

    #[test]
    fn alpaca_joins_instruction_and_input_and_unrolls_history() {
        let row = json!({"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "r"]]});
        let expected = [("user", "q"), ("assistant", "r"), ("user", "Add.\n1 2"), ("assistant", "3")];
        assert_eq!(turns(row), expected.map(|(r, c)| (r.to_string(), c.to_string())));
    }

    #[test]
    fn a_message_keeps_what_templates_read() {
        let row = json!({"messages": [{"role": "user", "content": "u"},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]}],
            "tools": "[{\"type\": \"function\"}]"});
        let Row::Conversation(conversation) = Row::parse(row).unwrap() else { panic!() };
        assert_eq!(conversation.messages[1].content(), None);
        assert_eq!(conversation.messages[1].object()["tool_calls"][0]["function"]["name"], "f");
        assert_eq!(conversation.tools, Some(json!([{"type": "function"}])));
    }

    #[test]
    fn faults_say_what_was_found_and_expected() {
        let unknown = fault(json!({"prompt": "x", "chosen": "y"}));
        assert!(unknown.contains("[prompt, chosen]") && unknown.contains("Alpaca (instruction"), "{unknown}");
        assert_eq!(fault(json!([1])), "expected a JSON object, found an array");
        assert_eq!(fault(json!({"messages": []})), "'messages' is empty");
        assert_eq!(fault(json!({"messages": "x"})), "'messages' is a string, expected an array of turns");
        let parts = fault(json!({"messages": [{"role": "user", "content": ["x"]}]}));
        assert_eq!(parts, "turn 0: 'content' is an array, expected a string");
        let keys = fault(json!({"conversations": [{"from": "human", "text": "x"}]}));
        assert_eq!(keys, "turn 0 has the keys [from, text], expected role and content, or from and value");
        let role = fault(json!({"conversations": [{"from": "alien", "value": "x"}]}));
        assert!(role.starts_with("turn 0 has the unknown role 'alien', expected one of system"), "{role}");
        assert_eq!(fault(json!({"instruction": "x"})), "the key 'output' is missing");
        let lengths = fault(json!({"input_ids": [1, 2], "labels": [1]}));
        assert_eq!(lengths, "'labels' has 1 entries, 'input_ids' has 2");
        assert_eq!(fault(json!({"input_ids": [1, -2]})), "'input_ids' entry 1 is -2, expected a token id");
        let label = fault(json!({"input_ids": [1], "labels": [-5]}));
        assert_eq!(label, "'labels' entry 0 is -5, expected a token id or -100");
    }
}
