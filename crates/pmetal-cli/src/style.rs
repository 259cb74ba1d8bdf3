//! Colour where a person looks; plain text in pipes, files, and where `NO_COLOR` asks for it.

use std::{env, io::IsTerminal};

/// How text for one stream is dressed.
#[derive(Clone, Copy)]
pub struct Style {
    coloured: bool,
}

impl Style {
    /// For what goes to stdout.
    pub fn stdout() -> Self {
        Self::of(std::io::stdout().is_terminal())
    }

    /// For what goes to stderr.
    pub fn stderr() -> Self {
        Self::of(std::io::stderr().is_terminal())
    }

    fn of(terminal: bool) -> Self {
        let set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let forced = set("CLICOLOR_FORCE") && env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0");
        let dumb = env::var_os("TERM").is_some_and(|value| value == "dumb");
        Self { coloured: !set("NO_COLOR") && (forced || (terminal && !dumb)) }
    }

    /// Headings.
    pub fn bold(self, text: &str) -> String {
        self.dressed("1", text)
    }

    /// What stays behind.
    pub fn dim(self, text: &str) -> String {
        self.dressed("2", text)
    }

    /// What is trained.
    pub fn green(self, text: &str) -> String {
        self.dressed("32", text)
    }

    /// What went wrong.
    pub fn error(self, text: &str) -> String {
        self.dressed("1;31", text)
    }

    fn dressed(self, codes: &str, text: &str) -> String {
        if self.coloured { format!("\u{1b}[{codes}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}
