use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use pmetal::core::Error as FileError;
use serde_json::Value;

use super::{
    answer::{Answer, Engine, Finish},
    prompts::Row,
    voice::{Prepared, Voice},
};
use crate::{
    tell::{shows_bars, tell},
    verbs::{Failure, Result},
};

/// Seconds between two lines of progress where there is no terminal.
const LINES_APART: Duration = Duration::from_secs(10);

/// Where answers go, a line each.
pub enum Results {
    /// Standard output.
    Stdout,
    /// A file. What was there before stays until the first answer.
    File {
        path: PathBuf,
        file: File,
        /// Nothing is in it that is ours.
        untouched: bool,
        /// It was not there before.
        new: bool,
    },
}

impl Results {
    /// Opens the file, so that one that cannot be written is known before any work.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::Stdout) };
        let new = !path.exists();
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(FileError::io("write", path))?;
        Ok(Self::File { path: path.to_path_buf(), file, untouched: true, new })
    }

    /// Writes a line, to the last byte.
    fn write(&mut self, line: &str) -> Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                writeln!(out, "{line}")?;
                out.flush()?;
            }
            Self::File { path, file, untouched, .. } => {
                let mut write = || {
                    // a pipe or a device has no length
                    if *untouched && file.metadata()?.is_file() {
                        file.set_len(0)?;
                    }
                    *untouched = false;
                    file.write_all(format!("{line}\n").as_bytes())
                };
                write().map_err(FileError::io("write", &path.clone()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        if let Self::File { path, untouched: true, new: true, .. } = self {
            // a file that we made and have no answer for
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The prompts of all rows as a voice reads them.
pub fn prepare(voice: &Voice, rows: &[Row]) -> Result<Vec<Prepared>> {
    let one = |row: &Row| {
        let prepared = voice.prepare(&row.prompt, "the prompt");
        prepared.map_err(|e| Failure::Row { place: row.place.clone(), reason: e.to_string() })
    };
    rows.iter().map(one).collect()
}

/// Answers every row with the engine's voice. Rows do not depend on one another: each is read from its beginning.
pub fn answer_all(
    engine: &mut Engine,
    rows: &[Row],
    prompts: &[Prepared],
    results: &mut Results,
    progress: &mut Progress,
) -> Result<()> {
    let params = engine.params.clone();
    for (row, prompt) in rows.iter().zip(prompts) {
        engine.forget();
        let answer = engine
            .answer(prompt, &params, &mut |_| Ok(()))
            .map_err(|e| Failure::Row { place: row.place.clone(), reason: e.to_string() })?;
        let mut fields = row.fields.clone();
        answer.add_to(&mut fields, &engine.voice);
        progress.set_aside(|| results.write(&Value::Object(fields).to_string()))?;
        progress.row(&answer);
        if answer.finish == Finish::Interrupted {
            return Err(Failure::Interrupted(format!("{} of {} answers are written", progress.done, progress.total)));
        }
    }
    Ok(())
}

/// How far the answers are, on stderr: a bar on a terminal, a line now and then elsewhere.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: usize,
    done: usize,
    tokens: usize,
    started: Instant,
    told: Instant,
}

impl Progress {
    /// Of `total` answers.
    pub fn new(total: usize) -> Self {
        let bar = shows_bars().then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} prompts  {msg}  {elapsed} < {eta}");
            ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        let now = Instant::now();
        Self { bar, total, done: 0, tokens: 0, started: now, told: now }
    }

    /// Does something that may print where the bar stands.
    fn set_aside<T>(&self, f: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) if io::stdout().is_terminal() => bar.suspend(f),
            _ => f(),
        }
    }

    fn row(&mut self, answer: &Answer) {
        self.done += 1;
        self.tokens += answer.generation.tokens.len();
        let rate = self.rate();
        match &self.bar {
            Some(bar) => {
                bar.set_message(rate);
                bar.set_position(self.done as u64);
            }
            None if self.told.elapsed() >= LINES_APART && self.done < self.total => {
                self.told = Instant::now();
                let left = self.started.elapsed().mul_f64((self.total - self.done) as f64 / self.done as f64);
                tell(format_args!("{}/{} prompts  {rate}  ETA {}", self.done, self.total, HumanDuration(left)));
            }
            None => {}
        }
    }

    fn rate(&self) -> String {
        let seconds = self.started.elapsed().as_secs_f64();
        format!("{:.1} tok/s", if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 })
    }

    /// The whole in one line.
    pub fn finish(&self, output: Option<&Path>) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let place = output.map(|path| format!(" in {}", path.display())).unwrap_or_default();
        tell(format_args!("{} answers{place}: {} tokens, {}", self.done, self.tokens, self.rate()));
    }
}
