//! What a download or upload shows: a bar per file on a terminal, plain lines elsewhere.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use pmetal::hub::DownloadProgress;

use crate::tell::{shows_bars, tell};

/// Fits 80 columns, whatever the numbers.
const BAR: &str = "{prefix:25.25} {wide_bar} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>4}";
const NO_TOTAL: &str = "{prefix:25.25} {spinner} {bytes:>10} {bytes_per_sec:>12}";
/// How often a long transfer says how far it is, where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);
const NAME_WIDTH: usize = 25;

/// Shows transfers on stderr.
pub struct TransferBars {
    verb: &'static str,
    bars: bool,
    current: RefCell<Option<Current>>,
    stop: Option<Arc<AtomicBool>>,
}

/// The file under way.
struct Current {
    file: String,
    bar: ProgressBar,
    started: Instant,
    told: Instant,
    from: u64,
}

impl TransferBars {
    /// For downloads.
    pub fn downloads() -> Self {
        Self::new("downloading")
    }

    /// For uploads.
    pub fn uploads() -> Self {
        Self::new("uploading")
    }

    fn new(verb: &'static str) -> Self {
        Self { verb, bars: shows_bars(), current: RefCell::default(), stop: None }
    }

    /// Ends transfers when this becomes true.
    pub fn until(self, stop: Arc<AtomicBool>) -> Self {
        Self { stop: Some(stop), ..self }
    }

    fn bar(&self, file: &str, total: Option<u64>) -> ProgressBar {
        let bar = if !self.bars {
            ProgressBar::hidden()
        } else if total.is_some() {
            ProgressBar::new(0).with_style(style(BAR))
        } else {
            ProgressBar::new_spinner().with_style(style(NO_TOTAL))
        };
        if let Some(total) = total {
            bar.set_length(total);
        }
        bar.with_prefix(shortened(file))
    }

    fn announce(&self, file: &str, total: Option<u64>, already: u64) {
        let size = total.map(|total| format!(" ({})", HumanBytes(total))).unwrap_or_default();
        let here = if already > 0 { format!(", {} of it done", HumanBytes(already)) } else { String::new() };
        tell(format_args!("{} {file}{size}{here}", self.verb));
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━━╌")
}

/// The end of a long name tells shards apart.
fn shortened(file: &str) -> String {
    let count = file.chars().count();
    if count <= NAME_WIDTH {
        return file.to_owned();
    }
    let kept: String = file.chars().skip(count - NAME_WIDTH + 1).collect();
    format!("…{kept}")
}

impl Current {
    /// A line about a transfer without a terminal.
    fn line(&self) -> String {
        let (done, seconds) = (self.bar.position(), self.started.elapsed().as_secs_f64());
        let rate = if seconds > 0.0 { (done.saturating_sub(self.from)) as f64 / seconds } else { 0.0 };
        let total = self.bar.length().map(|total| format!("/{}", HumanBytes(total))).unwrap_or_default();
        format!("{}: {}{total}, {}/s", self.file, HumanBytes(done), HumanBytes(rate as u64))
    }
}

impl DownloadProgress for TransferBars {
    fn start(&self, file: &str, total: Option<u64>, already: u64) {
        let mut current = self.current.borrow_mut();
        if let Some(same) = current.as_mut().filter(|current| current.file == file) {
            same.bar.set_position(already);
            return;
        }
        if let Some(left) = current.take() {
            left.bar.finish_and_clear();
        }
        if !self.bars {
            self.announce(file, total, already);
        }
        let bar = self.bar(file, total);
        bar.set_position(already);
        bar.reset_eta();
        let now = Instant::now();
        *current = Some(Current { file: file.to_owned(), bar, started: now, told: now, from: already });
    }

    fn advance(&self, _file: &str, bytes: u64) {
        if let Some(current) = self.current.borrow_mut().as_mut() {
            current.bar.inc(bytes);
            if !self.bars && current.told.elapsed() >= EVERY {
                current.told = Instant::now();
                tell(current.line());
            }
        }
    }

    fn finish(&self, _file: &str) {
        if let Some(current) = self.current.borrow_mut().take() {
            if !self.bars && current.started.elapsed() >= EVERY {
                tell(current.line());
            }
            current.bar.finish();
        }
    }

    fn note(&self, line: &str) {
        match self.current.borrow().as_ref().filter(|_| self.bars) {
            Some(current) => current.bar.println(line),
            None => tell(line),
        }
    }

    fn stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_ends() {
        assert_eq!(shortened("config.json"), "config.json");
        let shard = shortened("model-00001-of-00003.safetensors");
        assert_eq!((shard.as_str(), shard.chars().count()), ("…001-of-00003.safetensors", 25));
    }
}
