//! How deep a template nests. The Jinja library bounds nesting by brackets and blocks, but a chain (`a + a + a …`, `not not …`,
//! `x[0][0] …`, branch after branch of `elif`) becomes one level of its recursion per link, and a long one overflows the stack: no error,
//! the end of the process.

/// Operators of one expression, or branches of a template: many times what any template has.
const LONGEST_CHAIN: usize = 1000;

/// The line, from 1, where a chain is longer than the stack bears; none in any sane template.
pub(super) fn overlong_chain(source: &str) -> Option<usize> {
    let mut rest = source;
    let mut branches = 0;
    while let Some((at, end)) = next_block(rest) {
        let block = rest.get(at + 2..).unwrap_or_default();
        branches += usize::from(block.trim_start_matches(['-', '+']).trim_start().starts_with("elif"));
        let (links, length) = scan(block, end);
        if links > LONGEST_CHAIN || branches > LONGEST_CHAIN {
            let before = source.len() - rest.len() + at;
            return Some(1 + source.get(..before).unwrap_or_default().matches('\n').count());
        }
        rest = block.get(length..).unwrap_or_default();
    }
    None
}

/// Where the next expression, statement or comment starts, and what ends it.
fn next_block(source: &str) -> Option<(usize, &'static str)> {
    // one pass: a search for each kind would read the whole rest again for every block
    source.match_indices('{').find_map(|(at, _)| {
        let end = match source.as_bytes().get(at + 1)? {
            b'{' => "}}",
            b'%' => "%}",
            b'#' => "#}",
            _ => return None,
        };
        Some((at, end))
    })
}

/// The operators of a block outside its strings, and its length with what ends it.
fn scan(block: &str, end: &str) -> (usize, usize) {
    if end == "#}" {
        return (0, block.find(end).map_or(block.len(), |at| at + end.len()));
    }
    let mut links = 0;
    let mut quote = None;
    let mut characters = block.char_indices();
    while let Some((at, character)) = characters.next() {
        match (quote, character) {
            (Some(_), '\\') => drop(characters.next()),
            (Some(open), _) if open == character => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(character),
            (None, _) if block.get(at..).is_some_and(|rest| rest.starts_with(end)) => return (links, at + end.len()),
            (None, '+' | '-' | '*' | '/' | '%' | '~' | '|' | '.' | '[' | '(' | '<' | '>' | '=' | '!') => links += 1,
            (None, _) if character.is_whitespace() => links += usize::from(operator_follows(block, at)),
            (None, _) => {}
        }
    }
    (links, block.len())
}

/// Whether the word behind the blank at `at` is an operator.
fn operator_follows(block: &str, at: usize) -> bool {
    let behind = block.get(at..).unwrap_or_default().chars().skip(1);
    let word: String = behind.take_while(char::is_ascii_alphabetic).take(5).collect();
    ["not", "and", "or", "is", "in", "if", "else"].contains(&word.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_found_and_text_is_none() {
        let chain = |link: &str| format!("\n{{{{ x{} }}}}", link.repeat(LONGEST_CHAIN + 1));
        for link in ["[0]", ".a", "+x", "~'a'", "|f", "(1)", " not"] {
            assert_eq!(overlong_chain(&chain(link)), Some(2), "{link}");
        }
        let branches = format!("{{% if a %}}{}{{% endif %}}", "{%- elif a %}".repeat(LONGEST_CHAIN + 1));
        assert_eq!(overlong_chain(&branches), Some(1));
        for harmless in [
            "+-*".repeat(5000),
            format!("{{{{ '{}' }}}}", "+ \\'".repeat(5000)),
            format!("{{# {} #}}", "+".repeat(5000)),
            "{{ a.b[0] + c }}".repeat(5000),
            format!("{{% set x = [{}] %}}", "\n        'a',".repeat(5000)),
            "{% if".to_owned(),
            "{{ 'é".to_owned(),
        ] {
            assert_eq!(overlong_chain(&harmless), None);
        }
    }
}
