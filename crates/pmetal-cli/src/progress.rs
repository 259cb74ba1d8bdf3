//! What a run shows while it goes: a bar on a terminal, plain lines elsewhere.

use std::{
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use pmetal::{
    hub::DownloadProgress,
    trainer::{EvalMetrics, Observer, StepMetrics},
};

use crate::{
    reading::Reading,
    tell::{shows_bars, tell},
    transfer_bars::TransferBars,
};

/// Shows a training run on stderr.
pub struct Progress {
    bar: Option<ProgressBar>,
    logging_steps: usize,
    total: usize,
    started: Instant,
    reading: Reading,
    downloads: TransferBars,
}

impl Progress {
    /// A bar where stderr is a terminal, else a line every `logging_steps` steps. `stop` ends a download.
    pub fn new(logging_steps: usize, stop: Arc<AtomicBool>) -> Self {
        let bar = shows_bars().then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} steps  {msg}  {elapsed} < {eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self {
            bar,
            logging_steps: logging_steps.max(1),
            total: 0,
            started: Instant::now(),
            reading: Reading::new(),
            downloads: TransferBars::downloads().until(stop),
        }
    }

    fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => tell(line),
        }
    }

    fn eta(&self, step: usize) -> String {
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = elapsed / step.max(1) as f64 * (self.total.saturating_sub(step)) as f64;
        indicatif::HumanDuration(Duration::from_secs_f64(left)).to_string()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

impl Observer for Progress {
    fn reading(&mut self, file: &Path, read: u64, total: u64, rows: usize) {
        self.reading.update(file, read, total, rows);
    }

    fn start(&mut self, total_steps: usize) {
        self.total = total_steps;
        self.started = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_length(total_steps as u64);
            bar.reset_eta();
        }
    }

    fn step(&mut self, m: &StepMetrics) {
        let figures = format!(
            "loss {:.4}  {:.0} tok/s  peak {:.2} GiB",
            m.loss,
            m.tokens_per_second,
            m.peak_memory_bytes as f64 / f64::from(1 << 30)
        );
        match &self.bar {
            Some(bar) => {
                bar.set_message(figures);
                bar.set_position(m.step as u64);
            }
            None if m.step.is_multiple_of(self.logging_steps) || m.step == self.total || m.step == 1 => {
                let (lr, norm) = (m.learning_rate, m.grad_norm);
                let eta = self.eta(m.step);
                let place = format!("step {}/{}", m.step, self.total);
                tell(format_args!("{place}  {figures}  lr {lr:.2e}  grad norm {norm:.3}  ETA {eta}"));
            }
            None => {}
        }
    }

    fn eval(&mut self, m: &EvalMetrics) {
        if m.step == 0 {
            // the evaluation before the first step says nothing about how long steps take
            self.start(self.total);
        }
        let (step, loss, tokens) = (m.step, m.eval_loss, m.eval_tokens);
        self.line(&format!("step {step}: eval loss {loss:.4} over {tokens} tokens"));
    }

    fn note(&mut self, line: &str) {
        self.line(line);
    }

    fn downloads(&self) -> &dyn DownloadProgress {
        &self.downloads
    }
}
