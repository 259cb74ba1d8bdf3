//! What the reading of a dataset shows while it goes: a bar on a terminal, now and then a line elsewhere.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use pmetal::data::Watch;

use crate::tell::{shows_bars, tell};

/// Time before anything is shown: small files need nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(15);

/// Shows on stderr how far a file of rows has been read.
pub struct Reading {
    file: PathBuf,
    started: Instant,
    shown: Instant,
    bar: Option<ProgressBar>,
}

impl Reading {
    /// Nothing is shown before the first word.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { file: PathBuf::new(), started: now, shown: now, bar: None }
    }

    /// `read` of the `total` bytes of `file` were read, and `rows` rows tokenized.
    pub fn update(&mut self, file: &Path, read: u64, total: u64, rows: usize) {
        if self.file != file {
            *self = Self { file: file.to_path_buf(), ..Self::new() };
        }
        let waited = self.started.elapsed();
        if read >= total {
            self.finish(rows);
        } else if waited >= PATIENCE && shows_bars() {
            let bar = self.bar.get_or_insert_with(|| bar(file, total, self.started));
            bar.set_message(format!("{rows} rows"));
            bar.set_position(read);
        } else if waited >= PATIENCE && self.shown.elapsed() >= BETWEEN_LINES {
            self.shown = Instant::now();
            let seconds = waited.as_secs_f64();
            let left = Duration::from_secs_f64(seconds * (total - read) as f64 / read.max(1) as f64);
            let (name, share) = (file.display(), 100.0 * read as f64 / total.max(1) as f64);
            let (rate, left) = (HumanBytes((read as f64 / seconds) as u64), HumanDuration(left));
            tell(format_args!("tokenizing {name}: {share:.0} %, {rows} rows, {rate}/s, ETA {left}"));
        }
    }

    fn finish(&mut self, rows: usize) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if self.started.elapsed() >= PATIENCE {
            let (name, seconds) = (self.file.display(), self.started.elapsed().as_secs_f64());
            tell(format_args!("tokenized {name}: {rows} rows in {seconds:.1} s"));
        }
    }
}

fn bar(file: &Path, total: u64, started: Instant) -> ProgressBar {
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let template = "tokenizing {prefix}  {bar:20} {bytes}/{total_bytes}  {msg}  {bytes_per_sec}  ETA {eta}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style).with_prefix(name).with_elapsed(started.elapsed())
}

impl Watch for Reading {
    fn reading(&mut self, file: &Path, read: u64, total: u64, rows: usize) -> ControlFlow<()> {
        self.update(file, read, total, rows);
        ControlFlow::Continue(())
    }
}
