//! `{% generation %}` … `{% endgeneration %}`, a tag of `transformers` around what the assistant says. Jinja engines do not
//! know it, so the template is rewritten: each tag becomes a conditional that writes a variable, which is empty, or a mark
//! when the spans are wanted. The whitespace control of the tag stays where it was.

use std::ops::Range;

/// Variable written where a marked span begins.
pub(super) const BEGIN: &str = "pmetal_generation_begins";
/// Variable written where it ends.
pub(super) const END: &str = "pmetal_generation_ends";
/// What the variables hold when spans are wanted: two code points that are no characters.
pub(super) const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// The template without the tags, and whether it had any.
pub(super) fn rewrite(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let length = tag_length(tag);
        let (tag, after) = tag.split_at(length);
        rest = after;
        match generation_tag(tag) {
            Some((left, variable, right)) => {
                found = true;
                out.push_str(&format!("{{%{left} if true %}}{{{{ {variable} }}}}{{% endif {right}%}}"));
            }
            None => out.push_str(tag),
        }
    }
    out.push_str(rest);
    (out, found)
}

/// Bytes of the comment, expression or tag that `text` starts with; 1 where it is just a brace.
fn tag_length(text: &str) -> usize {
    let end = match text.get(..2) {
        Some("{#") => return text.find("#}").map_or(text.len(), |at| at + 2),
        Some("{%") => "%}",
        Some("{{") => "}}",
        _ => return 1,
    };
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None if text.get(at..).is_some_and(|rest| rest.starts_with(end)) => return at + 2,
            None => {}
        }
    }
    text.len()
}

/// Left control, variable and right control, if the tag is one of the two.
fn generation_tag(tag: &str) -> Option<(&str, &'static str, &str)> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let (left, inner) = inner.split_at(usize::from(inner.starts_with(['-', '+'])));
    let (inner, right) = inner.split_at(inner.len() - usize::from(inner.ends_with(['-', '+'])));
    match inner.trim() {
        "generation" => Some((left, BEGIN, right)),
        "endgeneration" => Some((left, END, right)),
        _ => None,
    }
}

/// The spans between the marks, in bytes of `text`, which is the rendering without marks. `None` when the marks do not
/// pair up, or leaving them out does not give `text` (a template that measures or trims what is between them).
pub(super) fn spans(marked: &str, text: &str) -> Option<Vec<Range<usize>>> {
    let mut spans = Vec::new();
    let mut start = None;
    let mut at = 0;
    for c in marked.chars() {
        if c == MARKS[0] {
            start = Some(at);
        } else if c == MARKS[1] {
            spans.push(start.take()?..at);
        } else {
            at += c.len_utf8();
        }
    }
    let same = marked.chars().filter(|c| !MARKS.contains(c)).eq(text.chars());
    (same && start.is_none() && !spans.is_empty()).then_some(spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_vanish_with_their_whitespace_control() {
        let environment = crate::template::environment::like_transformers();
        // Each rendered by transformers' environment with a generation block around `x`.
        let cases = [
            ("a {%- generation -%} x {%- endgeneration -%} b", "axb"),
            ("a\n  {% generation %}\n x\n  {% endgeneration %}\nb", "a\n x\nb"),
            ("{# {% generation %} #}{{ '{% generation %}' }}{%generation%}x{%endgeneration%}", "{% generation %}x"),
        ];
        for (source, expected) in cases {
            let (rewritten, found) = rewrite(source);
            assert!(found);
            assert_eq!(environment.render_str(&rewritten, ()).unwrap(), expected);
        }
        assert!(!rewrite("{ {{ x }} {% if y %}{% endif %}").1);
    }

    #[test]
    fn spans_are_bytes_of_the_plain_text() {
        assert_eq!(spans("é\u{fdd0}ab\u{fdd1}c\u{fdd0}\u{fdd1}", "éabc"), Some(vec![2..4, 5..5]));
        assert_eq!(spans("\u{fdd0}ab", "ab"), None);
        assert_eq!(spans("\u{fdd0}ab\u{fdd1}", "a"), None);
    }
}
