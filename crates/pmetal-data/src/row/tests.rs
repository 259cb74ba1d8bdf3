use serde_json::json;

use super::*;

fn parse(row: Value) -> Row {
    Row::parse(row).unwrap()
}

fn fault(row: Value) -> String {
    Row::parse(row).unwrap_err().to_string()
}

fn turns(row: Value) -> Vec<(String, String)> {
    let row = parse(row);
    let conversation = row.conversation().unwrap();
    let text = |m: &Message| {
        let content = m.object().get("content").and_then(Value::as_str).unwrap_or("none");
        (m.role().to_string(), content.to_string())
    };
    conversation.messages.iter().map(text).collect()
}

fn pairs<const N: usize>(turns: [(&str, &str); N]) -> Vec<(String, String)> {
    turns.map(|(role, text)| (role.to_string(), text.to_string())).into()
}

fn object(row: Value, turn: usize) -> Value {
    Value::Object(parse(row).conversation().unwrap().messages[turn].object().clone())
}

#[test]
fn formats_are_found_by_their_keys() {
    let expected = pairs([("system", "s"), ("user", "u"), ("assistant", "a")]);
    let [s, h, g] = [("system", "s"), ("human", "u"), ("gpt", "a")].map(|(r, c)| json!({"from": r, "value": c}));
    assert_eq!(turns(json!({"id": 7, "conversations": [s, h, g]})), expected);
    assert_eq!(turns(json!({"system": "s", "conversations": [h, g]})), expected);
    let messages = ["system", "user", "assistant"].map(|r| json!({"role": r, "content": &r[..1]}));
    assert_eq!(turns(json!({"messages": messages, "text": "x"})), expected);
    let row = json!({"instruction": "u", "input": "", "output": "a", "system": "s", "text": "x"});
    assert_eq!(turns(row.clone()), expected);
    // A table has every column in every row.
    let mut wide = row;
    wide["messages"] = Value::Null;
    wide["input_ids"] = Value::Null;
    assert_eq!(turns(wide), expected);
    assert_eq!(parse(json!({"text": "t", "prompt": null})), Row::Text("t".into()));
    let row = parse(json!({"input_ids": [1, 2], "labels": [-100, 2]}));
    assert_eq!(row, Row::Tokens { input_ids: vec![1, 2], labels: Some(vec![-100, 2]) });
    assert_eq!(parse(json!({"input_ids": [1, 2]})), Row::Tokens { input_ids: vec![1, 2], labels: None });
    let row = parse(json!({"prompt": "p", "completion": "c"}));
    assert_eq!(row, Row::PromptCompletion { prompt: "p".into(), completion: "c".into() });
}

#[test]
fn alpaca_joins_instruction_and_input_and_unrolls_history() {
    let row = json!({"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "r"]]});
    assert_eq!(turns(row), pairs([("user", "q"), ("assistant", "r"), ("user", "Add.\n1 2"), ("assistant", "3")]));
}

#[test]
fn every_spelling_of_a_role_is_known() {
    for (from, role) in [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("observation", "tool"),
        ("function", "tool"),
        ("tool", "tool"),
        ("developer", "developer"),
        ("system", "system"),
    ] {
        assert_eq!(turns(json!({"conversations": [{"from": from, "value": "x"}]})), pairs([(role, "x")]), "{from}");
    }
}

#[test]
fn calls_of_tools_come_in_one_form() {
    let call = json!({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
    let bare = json!({"name": "f", "arguments": {"x": 1}});
    let spellings = [
        json!({"from": "function_call", "value": bare.to_string()}),
        json!({"from": "function_call", "value": json!([bare]).to_string()}),
        json!({"role": "assistant", "content": "", "function_call": bare}),
        json!({"role": "assistant", "content": "", "tool_calls": [call]}),
        json!({"role": "assistant", "content": "", "tool_calls": [bare]}),
        json!({"role": "assistant", "content": "", "tool_calls": json!([call]).to_string()}),
    ];
    for turn in spellings {
        let expected = json!({"role": "assistant", "content": "", "tool_calls": [call]});
        assert_eq!(object(json!({"messages": [turn]}), 0), expected, "{turn}");
    }
    // What else a call says stays, and so does the form of its arguments; null content and no content differ.
    let full = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}});
    let turn = json!({"role": "assistant", "content": null, "tool_calls": [full]});
    assert_eq!(object(json!({"messages": [turn]}), 0), turn);
    let turn = json!({"role": "assistant", "tool_calls": [full]});
    assert_eq!(object(json!({"messages": [turn]}), 0), turn);
    let result = json!({"role": "tool", "tool_call_id": "1", "name": "f", "content": "2"});
    assert_eq!(object(json!({"messages": [result]}), 0)["tool_call_id"], "1");
}

#[test]
fn tools_are_an_array_or_a_text_of_one() {
    let function = json!({"name": "f", "parameters": {}});
    let tool = json!({"type": "function", "function": function});
    let turn = json!({"role": "user", "content": "u"});
    for (key, value) in [
        ("tools", json!([tool])),
        ("tools", json!(json!([tool]).to_string())),
        ("tools", json!([tool.to_string()])),
        ("functions", json!([function])),
        ("functions", json!(json!([function]).to_string())),
    ] {
        let row = parse(json!({"messages": [turn], key: value}));
        assert_eq!(row.conversation().unwrap().tools, Some(json!([tool])));
    }
    for none in [json!(null), json!(""), json!("null")] {
        assert_eq!(parse(json!({"messages": [turn], "tools": none})).conversation().unwrap().tools, None);
    }
    let bad = |tools: Value| fault(json!({"messages": [turn], "tools": tools}));
    assert_eq!(bad(json!(3)), "'tools' is a number, expected an array");
    assert_eq!(bad(json!([3])), "'tools' entry 0 is a number, expected an object");
    assert!(bad(json!("[{")).starts_with("bad JSON: in 'tools': EOF"));
}

#[test]
fn a_turn_says_whether_it_is_trained() {
    let row = |key: &str, value: Value| json!({"messages": [{"role": "assistant", "content": "a", key: value}]});
    let trained = |key: &str, value: Value| {
        let row = parse(row(key, value));
        let conversation = row.conversation().unwrap().into_owned();
        assert_eq!(conversation.messages[0].object().len(), 2);
        conversation.messages[0].trained()
    };
    for (key, value, expected) in [
        ("weight", json!(0), false),
        ("weight", json!(0.0), false),
        ("weight", json!(1), true),
        ("weight", json!(null), true),
        ("train", json!(false), false),
        ("train", json!(true), true),
    ] {
        assert_eq!(trained(key, value), expected);
    }
    assert_eq!(fault(row("weight", json!(0.5))), "turn 0: 'weight' is 0.5, expected 0 (not trained) or 1");
    assert_eq!(fault(row("train", json!("no"))), "turn 0: 'train' is a string, expected true or false");
}

#[test]
fn parts_are_texts_and_reasoning() {
    let turn = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let text = json!({"type": "text", "text": "x", "image": null});
    assert_eq!(object(turn(text), 0)["content"], json!([{"type": "text", "text": "x"}]));
    let thinking = json!({"type": "thinking", "thinking": "x"});
    assert_eq!(object(turn(thinking.clone()), 0)["content"], json!([thinking]));
    let image = fault(turn(json!({"type": "image_url", "image_url": {}})));
    assert_eq!(
        image,
        "turn 0: 'content' entry 0 is of type 'image_url'; only text and reasoning are trained on so far"
    );
    let keys = fault(turn(json!({"type": "text"})));
    assert_eq!(keys, "turn 0: 'content' entry 0 has the keys [type], expected type and text");
}

#[test]
fn prompt_and_completion_as_messages_train_the_completion() {
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let row = parse(json!({"prompt": [said("user", "a"), said("assistant", "b"), said("user", "c")],
        "completion": [said("assistant", "d")]}));
    let conversation = row.conversation().unwrap();
    assert_eq!(conversation.messages.iter().map(Message::trained).collect::<Vec<_>>(), [true, false, true, true]);
}

#[test]
fn preferences_are_recognised() {
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let share = |from: &str, text: &str| json!({"from": from, "value": text});
    let rows = [
        json!({"prompt": "p", "chosen": "a", "rejected": "b"}),
        json!({"chosen": [said("user", "p"), said("assistant", "a")], "rejected": [said("user", "p"), said("assistant", "b")]}),
        json!({"prompt": [said("user", "p")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}),
        json!({"conversations": [share("human", "p")], "chosen": share("gpt", "a"), "rejected": share("gpt", "b")}),
        json!({"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"}),
        json!({"prompt": "p", "completion": "a", "label": true}),
    ];
    for row in rows {
        let parsed = parse(row.clone());
        let Row::Preference(preference) = &parsed else { panic!("{row}: {parsed:?}") };
        assert!(preference.fault().to_string().starts_with("a preference row ('"), "{row}");
        // Written, it reads back as what it was.
        let written = parsed.write(Format::Preference).unwrap();
        if !row.as_object().unwrap().contains_key("instruction") {
            assert_eq!(parse(written), parsed, "{row}");
        }
    }
    // A conversation that is answered is one, whatever stands beside it.
    let row = json!({"messages": [said("user", "p"), said("assistant", "a")], "chosen": "a", "rejected": "b"});
    assert!(matches!(parse(row), Row::Conversation(_)));
    assert!(matches!(parse(json!({"prompt": "p", "completion": "c", "label": 3})), Row::PromptCompletion { .. }));
    let Row::Preference(preference) = parse(json!({"prompt": "p", "chosen": "a", "rejected": "b"})) else { panic!() };
    assert_eq!(
        preference.fault().to_string(),
        "a preference row ('chosen' and 'rejected'); supervised fine-tuning needs rows with one answer: messages, \
         conversations, or prompt and completion; for the chosen answers alone: --columns completion=chosen"
    );
}

#[test]
fn faults_say_what_was_found_and_expected() {
    let unknown = fault(json!({"question": "x", "answer": "y"}));
    assert!(unknown.contains("[question, answer]") && unknown.contains("Alpaca (instruction"), "{unknown}");
    for (row, expected) in [
        (json!([1]), "expected a JSON object, found an array"),
        (json!({"messages": []}), "'messages' is empty"),
        (json!({"messages": "x"}), "'messages' is a string, expected an array of turns"),
        (json!({"messages": null}), "'messages' is null, expected an array of turns"),
        (json!({"text": null}), "'text' is null, expected a string"),
        (
            json!({"messages": [{"role": "user", "content": ["x"]}]}),
            "turn 0: 'content' entry 0 is a string, expected an object with type and text",
        ),
        (
            json!({"messages": [{"role": "user", "content": 4}]}),
            "turn 0: 'content' is a number, expected a string or an array of parts",
        ),
        (json!({"messages": [{"role": "user", "content": null}]}), "turn 0: 'content' is null, expected a string"),
        (
            json!({"conversations": [{"from": "human", "text": "x"}]}),
            "turn 0 has the keys [from, text], expected role and content, or from and value",
        ),
        (json!({"messages": [{"role": 3, "content": "x"}]}), "turn 0: 'role' is a number, expected a string"),
        (json!({"instruction": "x"}), "the key 'output' is missing"),
        (json!({"instruction": "x", "output": 3}), "'output' is a number, expected a string"),
        (json!({"prompt": 3, "completion": "x"}), "'prompt' is a number, expected a string or an array of turns"),
        (json!({"input_ids": [1, 2], "labels": [1]}), "'labels' has 1 entries, 'input_ids' has 2"),
        (json!({"input_ids": [1, -2]}), "'input_ids' entry 1 is -2, expected a token id"),
        (json!({"input_ids": [1], "labels": [-5]}), "'labels' entry 0 is -5, expected a token id or -100"),
        (
            json!({"conversations": [{"from": "function_call", "value": "{}"}]}),
            "turn 0: 'value' entry 0 has no 'name', expected a call as {\"name\": …, \"arguments\": {…}}",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}]}),
            "turn 0: 'tool_calls' entry 0: 'arguments' is a number, expected an object or a string of JSON",
        ),
    ] {
        assert_eq!(fault(row), expected);
    }
    let role = fault(json!({"conversations": [{"from": "alien", "value": "x"}]}));
    assert!(role.starts_with("turn 0 has the unknown role 'alien', expected one of system"), "{role}");
}

/// Rows of every format, each with the formats that hold it.
fn written() -> Vec<(Value, Vec<Format>)> {
    use Format::{Alpaca, Messages, PromptCompletion, ShareGpt, Text};
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let call = json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let chat =
        [said("system", "s"), said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")];
    let calling = [
        said("user", "u"),
        json!({"role": "assistant", "content": "", "tool_calls": call}),
        said("tool", "1"),
        said("assistant", "d"),
    ];
    vec![
        (json!({"text": "é"}), vec![Text]),
        (json!({"prompt": "p", "completion": "c"}), vec![Text, PromptCompletion]),
        (json!({"messages": chat}), vec![Messages, ShareGpt, Alpaca]),
        (json!({"messages": chat[..3]}), vec![Messages, ShareGpt, Alpaca, PromptCompletion]),
        (json!({"messages": calling, "tools": tools}), vec![Messages, ShareGpt, PromptCompletion]),
        (
            json!({"messages": [said("user", "u"), {"role": "assistant", "content": "x", "weight": 0}, said("user", "v"),
                {"role": "assistant", "content": "y", "reasoning_content": "r"}]}),
            vec![Messages, ShareGpt, PromptCompletion],
        ),
        (
            json!({"messages": [said("user", "u"), {"role": "assistant", "content": "x",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}),
            vec![Messages, ShareGpt, PromptCompletion],
        ),
        (json!({"input_ids": [1, 2]}), vec![]),
        (json!({"prompt": "p", "chosen": "a", "rejected": "b"}), vec![Format::Preference]),
    ]
}

#[test]
fn written_rows_read_back_the_same_or_are_refused() {
    use Format::{Alpaca, Messages, Preference, PromptCompletion, ShareGpt, Text};
    for (value, fits) in written() {
        let row = parse(value.clone());
        for format in [Messages, ShareGpt, Alpaca, Text, PromptCompletion, Preference] {
            let written = row.write(format);
            if matches!(row, Row::PromptCompletion { .. }) && matches!(format, Messages | ShareGpt | Alpaca | Text) {
                assert!(written.is_ok(), "{value} as {format}");
                continue;
            }
            match written {
                Ok(written) if fits.contains(&format) => {
                    let again = parse(written.clone());
                    match (row.conversation(), again.conversation()) {
                        (Some(one), Some(other)) => assert_eq!(one, other, "{written}"),
                        _ => assert_eq!(row, again, "{written}"),
                    }
                }
                Err(_) if !fits.contains(&format) => {}
                other => panic!("{value} as {format}: {other:?}"),
            }
        }
    }
}

#[test]
fn written_forms_are_those_of_the_field() {
    let row =
        parse(json!({"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "r"]], "system": "s"}));
    assert_eq!(
        row.write(Format::ShareGpt).unwrap(),
        json!({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "r"},
            {"from": "human", "value": "Add.\n1 2"}, {"from": "gpt", "value": "3"}]})
    );
    assert_eq!(parse(row.write(Format::Alpaca).unwrap()), row);
    let call = json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]);
    let row = parse(
        json!({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "1"}], "tools": [{"name": "f"}]}),
    );
    assert_eq!(
        row.write(Format::ShareGpt).unwrap(),
        json!({"conversations": [{"from": "human", "value": "u"},
            {"from": "function_call", "value": "{\"name\":\"f\",\"arguments\":{\"x\":1}}"}, {"from": "observation", "value": "1"}],
            "tools": "[{\"name\":\"f\"}]"})
    );
    let refused = row.write(Format::Alpaca).unwrap_err().to_string();
    assert_eq!(refused, "the row cannot be written as alpaca: Alpaca has no place for tools");
    for name in ["messages", "sharegpt", "alpaca", "text", "prompt-completion", "preference"] {
        assert_eq!(name.parse::<Format>().unwrap().to_string(), name);
    }
    let unknown = "csv".parse::<Format>().unwrap_err().to_string();
    assert!(unknown.starts_with("no row format 'csv': expected messages, sharegpt"), "{unknown}");
}
