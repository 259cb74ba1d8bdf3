//! The Jinja that `transformers` gives chat templates: `chat_template_utils.py`, `ImmutableSandboxedEnvironment` with block
//! trimming, loop controls, and a handful of functions.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value, escape_formatter,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::{
    python_json::Style,
    python_str::{python_str, write_str},
    strftime::strftime,
};

/// Instructions a rendering may cost, bytes counting a 64th: seconds of work, and far above what a long conversation needs.
const FUEL: u64 = 8_000_000;

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// An environment that renders as `transformers` does.
pub(super) fn like_transformers() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(false);
    if let Ok(syntax) = syntax.build() {
        environment.set_syntax(syntax);
    }
    // Jinja's default: an undefined value prints as nothing and is an error to look into.
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(python_method);
    environment.set_formatter(print);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| match value.as_str() {
        Some(_) => Ok(value.clone()),
        None => python_str(value).map(Value::from),
    });
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Writes a value as Python's `str` does where the engine's own way is another: floats, and containers with what is in them.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if value.as_str().is_none() => {
            write_str(out, value).map_err(Error::from)
        }
        _ => escape_formatter(out, state, value),
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception was called").with_source(Raised(message)))
}

/// Today's date, in UTC: the same rows give the same tokens wherever they are rendered.
fn strftime_now(format: String) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    strftime(seconds, &format)
}

/// The day that templates are told.
pub(super) fn today() -> String {
    strftime_now("%F".to_string())
}

/// `json.dumps(x, ensure_ascii, indent, separators, sort_keys)`, in this order of arguments.
fn to_json(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let ensure_ascii = options.get::<Option<Value>>("ensure_ascii")?.or(ensure_ascii);
    let indent = options.get::<Option<Value>>("indent")?.or(indent);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let indent = match indent.filter(|indent| !indent.is_none() && !indent.is_undefined()) {
        None => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_string(),
            (None, Some(spaces @ ..=64)) => " ".repeat(spaces),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent is no small number")),
        }),
    };
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators is no pair")),
    };
    let ensure_ascii = ensure_ascii.is_some_and(|yes| yes.is_true());
    Style { ensure_ascii, indent: indent.as_deref(), item, key, sort_keys }.dump(value)
}

/// Jinja's `sequence`: whatever has a length and items, so strings and mappings too.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// Jinja's `iterable`: an undefined value is one, `none` is not.
fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || matches!(value.kind(), ValueKind::Iterable | ValueKind::Undefined)
}

/// Methods of Python's types: those of minijinja-contrib, and the string methods templates use beyond them.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return unknown_method_callback(state, value, method, args) };
    let triple = |parts: Option<(&str, &str)>, between: &str, missing: [&str; 3]| {
        Value::from_iter(parts.map_or(missing, |(before, after)| [before, between, after]))
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" => {
            let (between,): (&str,) = from_args(args)?;
            Ok(triple(text.split_once(between), between, [text, "", ""]))
        }
        "rpartition" => {
            let (between,): (&str,) = from_args(args)?;
            Ok(triple(text.rsplit_once(between), between, ["", "", text]))
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn render(source: &str) -> String {
        let context = context!(text => "a b", items => ["x", "y"], map => context!(k => "é<"), none => ());
        like_transformers().render_str(source, context).unwrap_or_else(|e| format!("{e:#}"))
    }

    /// Expected values printed by jinja2 3.1.6 with the environment of transformers.
    #[test]
    fn renders_like_jinja2() {
        assert_eq!(
            render("{{ true }} {{ none }} {{ missing }}|{{ 1.0 }} {{ [1, 'a', none, true] }}"),
            "True None |1.0 [1, 'a', None, True]"
        );
        assert_eq!(
            render("{{ text is sequence }} {{ map is sequence }} {{ items is iterable }} {{ none is iterable }}"),
            "True True True False"
        );
        assert_eq!(render("{% if true %}\n  a\n  {% endif %}\nb\n"), "  a\nb");
        assert_eq!(render("{% for i in items %}{% if i == 'y' %}{% break %}{% endif %}{{ i }}{% endfor %}"), "x");
        assert_eq!(
            render("{{ 'x' in missing }} {{ none.k is defined }} {{ map.k }} {{ map.none is none }}"),
            "False False é< False"
        );
        assert_eq!(
            render("{{ map|tojson }} {{ items|tojson(indent=2) }} {{ map|tojson(ensure_ascii=true) }}"),
            "{\"k\": \"é<\"} [\n  \"x\",\n  \"y\"\n] {\"k\": \"\\u00e9<\"}"
        );
        assert_eq!(
            render(
                "{{ 'a-b-c'.partition('-')[2] }} {{ 'a-b-c'.rpartition('-')[0] }} {{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('bc') }}"
            ),
            "b-c a-b bc a"
        );
        assert_eq!(
            render(
                "{{ 'x\\n'.rstrip('\\n') }}{{ ' a '.strip() }}{{ 'abc'[::-1] }}{{ text.split(' ')[-1] }}{{ 'a' 'b' }}"
            ),
            "xacbabab"
        );
    }

    #[test]
    fn a_runaway_template_is_stopped() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}";
        assert!(render(endless).contains("out of fuel"));
    }
}
