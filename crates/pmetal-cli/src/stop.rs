//! Ends an answer before a given text, as it streams.

/// Passes text on until one of some texts comes, which is held back together with what follows.
pub struct StopMatcher {
    stops: Vec<String>,
    /// What may be the beginning of one of them.
    held: String,
}

impl StopMatcher {
    /// A matcher of texts, none of them empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes a piece of text; returns what of it may be shown now, and whether one of the texts is complete.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        // the one that is complete first, however the text is cut
        if let Some((at, _)) = found.min_by_key(|&(at, len)| (at + len, at)) {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let uncertain = self.stops.iter().map(|stop| held_back(&self.held, stop)).max().unwrap_or(0);
        (self.held.drain(..self.held.len() - uncertain).collect(), false)
    }

    /// What was held back when the text went on otherwise, or ended.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that begins `tag`, but is not all of it.
pub fn held_back(text: &str, tag: &str) -> usize {
    let heads = tag.char_indices().rev().filter_map(|(at, _)| tag.get(..at));
    heads.filter(|head| !head.is_empty()).find(|head| text.ends_with(head)).map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(stops: &[&str], text: &str, size: usize) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut shown = String::new();
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(size) {
            let (more, stop) = matcher.push(&piece.iter().collect::<String>());
            shown.push_str(&more);
            assert!(text.starts_with(&shown));
            if stop {
                return (shown, true);
            }
        }
        (shown + &matcher.flush(), false)
    }

    #[test]
    fn the_text_is_never_shown_however_it_is_cut() {
        for size in 1..12 {
            let is = |stops: &[&str], text: &str, shown: &str, stop| {
                assert_eq!(stopped(stops, text, size), (shown.to_owned(), stop), "{stops:?} in pieces of {size}");
            };
            is(&["END"], "so ENENDING", "so EN", true);
            is(&["END"], "the EN", "the EN", false);
            is(&["\n\n", "###"], "one\ntwo\n\n###", "one\ntwo", true);
            is(&["aab"], "aaaab", "aa", true);
            is(&["abcd", "bc"], "xabcd", "xa", true);
            is(&["né€"], "né né€", "né ", true);
            is(&["né€"], "né", "né", false);
            is(&[], "all of it", "all of it", false);
            is(&["all"], "all of it", "", true);
        }
    }

    #[test]
    fn what_cannot_be_the_beginning_is_shown_at_once() {
        let mut matcher = StopMatcher::new(vec!["<end>".into()]);
        assert_eq!(matcher.push("a <en"), ("a ".into(), false));
        assert_eq!(matcher.push("ough"), ("<enough".into(), false));
    }
}
