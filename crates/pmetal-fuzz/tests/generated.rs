//! Inputs put together at random from the parts that a format is made of: deeper than damage gets.

use proptest::{collection::vec, prelude::*, sample::select, test_runner::RngSeed};
use serde_json::{Map, Value, json};

use pmetal_fuzz::{adapter, jsonl, safetensors, template};

/// Keys that rows are known by, and some that they are not.
const KEYS: [&str; 20] = [
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "text",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "input_ids",
    "labels",
    "tools",
    "tool_calls",
    "reasoning_content",
    "prompt",
    "completion",
    "weight",
];
const TEXTS: [&str; 12] = [
    "",
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "hello",
    "\u{0}",
    "<|im_end|>",
    "\u{2581}\u{1f9f6}",
    "{{ x }}",
];

/// Any JSON a row may hold.
fn row() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-200_i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        select(&TEXTS[..]).prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    let key = || select(&KEYS[..]).prop_map(str::to_owned);
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            vec((key(), inner), 0..6).prop_map(|pairs| Value::Object(Map::from_iter(pairs))),
        ]
    })
}

/// What templates are written with.
const PIECES: [&str; 44] = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m.role == 'user' %}",
    "{% elif loop.first %}",
    "{% else %}",
    "{% endif %}",
    "{{ m.content }}",
    "{{ m['content'][0] }}",
    "{{ m.content[1:] }}",
    "{{ messages[0].role ~ m }}",
    "{{ messages | tojson }}",
    "{{ messages[::-1] | length }}",
    "{% set ns = namespace(i=0) %}",
    "{% set ns.i = ns.i + 1 %}",
    "{{ ns.i }}",
    "{% set x = m.content.split('</think>')[-1].lstrip('\\n') %}",
    "{{ x }}",
    "{% break %}",
    "{% continue %}",
    "{% macro f(a, b=1) %}",
    "{% endmacro %}",
    "{{ f(messages) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y-%m-%d %Q %') }}",
    "{{ bos_token + eos_token }}",
    "{{ 'a' * 99999999 }}",
    "{{ range(99999999) | list }}",
    "{{ [1] * 99999999 }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ 1 // 0 }}",
    "{{ 2 ** 9999 }}",
    "{{ m.content | trim | upper }}",
    "{{ undefined.x.y }}",
    "{{ '%s' | format(1) }}",
    "{{ 'é\u{1f9f6}'[1] }}",
    "{{ \"\\ud800\" }}",
    "{# note #}",
    "{% raw %}",
    "{% endraw %}",
    "{%- filter upper -%}",
    "{% endfilter %}",
    "text \u{0} {",
];

/// A number that an offset or a dimension may be.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0_u64..80, Just(1 << 32), Just(1 << 62), any::<u64>()]
}

/// A safetensors file with any header that has the right keys.
fn tensors() -> impl Strategy<Value = Vec<u8>> {
    let name =
        select(vec!["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "x", "__metadata__", ""]);
    let dtype = select(vec!["F32", "BF16", "I64", "F8_E4M3", "BOOL", "F4", "?"]);
    let info = (dtype, vec(number(), 0..5), number(), number());
    let header = vec((name, info), 0..6).prop_map(|tensors| {
        let info = |(dtype, shape, start, end): (&str, Vec<u64>, u64, u64)| {
            json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
        };
        Value::Object(tensors.into_iter().map(|(name, parts)| (name.to_owned(), info(parts))).collect()).to_string()
    });
    (header, 0_usize..80).prop_map(|(header, data)| {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0x3c; 80][..data]].concat()
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(3),
        ..ProptestConfig::with_cases(200)
    })]

    #[test]
    fn rows_of_any_shape(rows in vec(row(), 1..4)) {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        jsonl(lines.join("\n").as_bytes());
        jsonl(Value::Array(rows).to_string().as_bytes());
    }

    #[test]
    fn templates_of_any_pieces(pieces in vec(select(&PIECES[..]), 0..12)) {
        template(pieces.concat().as_bytes());
    }

    #[test]
    fn headers_of_any_numbers(file in tensors()) {
        safetensors(&file);
        adapter(&file);
    }
}
