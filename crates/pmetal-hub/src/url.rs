//! What is done with URLs: encoding parts of them, telling hosts apart, following a `Location`.

use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, utf8_percent_encode};

/// Everything but letters, digits and `-._~`.
const PART: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// The same, with slashes left alone.
const PATH: &AsciiSet = &PART.remove(b'/');

/// What stands in no address, and still comes in a `Location` now and then.
const STRAY: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'<').add(b'>').add(b'\\').add(b'^').add(b'`').add(b'{').add(b'|').add(b'}');

/// A part of a path, slashes encoded: a revision such as `refs/pr/1`.
pub(crate) fn encode_part(text: &str) -> String {
    utf8_percent_encode(text, PART).to_string()
}

/// A path, slashes kept.
pub(crate) fn encode_path(text: &str) -> String {
    utf8_percent_encode(text, PATH).to_string()
}

/// Scheme, host and port of a URL, in lower case; empty for anything else.
pub(crate) fn origin(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return String::new() };
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    format!("{scheme}://{host}").to_ascii_lowercase()
}

/// Whether two URLs have the same origin; a step from http to https of one host counts as the same.
pub(crate) fn same_origin(from: &str, to: &str) -> bool {
    let (from, to) = (origin(from), origin(to));
    let upgraded = from.strip_prefix("http://").is_some_and(|host| to.strip_prefix("https://") == Some(host));
    !from.is_empty() && (from == to || upgraded)
}

/// Where a `Location` in the answer of `url` leads.
pub(crate) fn join(url: &str, location: &str) -> String {
    let location = utf8_percent_encode(location.trim(), STRAY).to_string();
    if location.starts_with("http://") || location.starts_with("https://") {
        return location;
    }
    if let Some(rest) = location.strip_prefix("//") {
        let scheme = url.split_once("://").map_or("https", |(scheme, _)| scheme);
        return format!("{scheme}://{rest}");
    }
    let host = origin(url);
    if location.starts_with('/') {
        return format!("{host}{location}");
    }
    let path = url.get(host.len()..).unwrap_or_default();
    let path = path.split(['?', '#']).next().unwrap_or_default();
    if location.starts_with('?') {
        return format!("{host}{path}{location}");
    }
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    format!("{host}{folder}/{location}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_lead_where_a_browser_goes() {
        let url = "https://Hub.example:8443/org/name/resolve/main/a.json?x=1";
        for (location, expected) in [
            ("https://cdn.example/f?sig=1", "https://cdn.example/f?sig=1"),
            ("//cdn.example/f", "https://cdn.example/f"),
            ("/api/f", "https://hub.example:8443/api/f"),
            ("b.json", "https://hub.example:8443/org/name/resolve/main/b.json"),
            ("/a b|ü?next=https://x", "https://hub.example:8443/a%20b%7C%C3%BC?next=https://x"),
            ("?y=2", "https://hub.example:8443/org/name/resolve/main/a.json?y=2"),
        ] {
            assert_eq!(join(url, location), expected);
        }
    }

    #[test]
    fn a_token_may_go_to_one_origin_only() {
        assert!(same_origin("https://hub.example/a", "https://HUB.example/b?c"));
        assert!(same_origin("http://hub.example/a", "https://hub.example/b"));
        for other in ["http://hub.example/a", "https://hub.example:444/a", "https://hub.example.evil/a", "/a", ""] {
            assert!(!same_origin("https://hub.example/a", other), "{other}");
        }
        assert!(!same_origin("", ""));
    }

    #[test]
    fn names_are_encoded_as_the_hub_expects() {
        assert_eq!(encode_part("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encode_path("data/a b+ü.json"), "data/a%20b%2B%C3%BC.json");
    }
}
