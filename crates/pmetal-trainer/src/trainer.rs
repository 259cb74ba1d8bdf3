//! The loop: epochs of micro-batches, steps, evaluations, and when to stop.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use pmetal_data::{Example, Examples};
use pmetal_models::CausalLMModel;
use pmetal_ops::{Arena, device};

use crate::{
    Error, EvalMetrics, MetricsFile, Observer, Result, Schedule, StepMetrics,
    step::{MicroBatch, StepSettings, evaluate_rows, train_step},
};

/// Steps in a row with a loss or gradient that is not finite, after which a run stops.
const TOLERATED: usize = 3;

/// Tokens that go through the model together in an evaluation, roughly.
const EVAL_TOKENS: usize = 4096;

/// Which rows go together in which order.
pub trait Epochs {
    /// Micro-batches of an epoch.
    fn batches(&self) -> usize;
    /// The rows of each micro-batch of an epoch, counted from 0.
    fn epoch(&self, epoch: usize) -> Box<dyn Iterator<Item = Vec<usize>> + '_>;
}

/// The rows of a run.
pub struct TrainingData<'a> {
    /// Rows to train on.
    pub rows: &'a Examples,
    /// Rows to evaluate on, none for no evaluation.
    pub eval_rows: &'a Examples,
    /// The order.
    pub order: &'a dyn Epochs,
}

/// How long, how often, how fast.
#[derive(Clone, Debug)]
pub struct LoopSettings {
    /// Passes over the data; the last may be broken.
    pub epochs: f64,
    /// Steps, whatever the epochs say; 0 for as many as the epochs give.
    pub max_steps: usize,
    /// Micro-batches of a step.
    pub gradient_accumulation_steps: usize,
    /// The learning rate; its `total_steps` is filled in by the loop.
    pub schedule: Schedule,
    /// Share of the steps for warm-up, where the schedule has none.
    pub warmup_ratio: f64,
    /// Evaluate every so many steps; 0 for only before and after.
    pub eval_steps: usize,
    /// The rest.
    pub step: StepSettings,
}

/// How a run ended.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Steps taken.
    pub steps: usize,
    /// Steps there would have been without an interruption.
    pub planned_steps: usize,
    /// Steps left out because loss or gradient was not finite.
    pub skipped_steps: usize,
    /// Tokens seen.
    pub tokens: u64,
    /// Seconds, evaluations not counted.
    pub seconds: f64,
    /// Mean loss of the evaluation rows before the first step.
    pub eval_loss_before: Option<f64>,
    /// Mean loss of the evaluation rows after the last step.
    pub eval_loss_after: Option<f64>,
    /// Whether it was asked to stop early.
    pub interrupted: bool,
}

impl LoopSettings {
    /// Steps of an epoch of so many micro-batches, and of the whole run.
    pub(crate) fn steps(&self, batches: usize) -> (usize, usize) {
        let steps_per_epoch = batches.div_ceil(self.gradient_accumulation_steps);
        let planned = match self.max_steps {
            0 => (self.epochs * steps_per_epoch as f64).ceil() as usize,
            steps => steps,
        };
        (steps_per_epoch, planned)
    }
}

/// Trains the parameters of `arena` until the settings or `stop` end it; a step under way is finished.
pub fn train(
    model: &dyn CausalLMModel,
    arena: &Arena,
    data: &TrainingData,
    settings: &LoopSettings,
    metrics: &mut MetricsFile,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Summary> {
    let (steps_per_epoch, planned) = settings.steps(data.order.batches());
    if steps_per_epoch == 0 {
        return Err(Error::NoSteps { reason: "there are no rows".into() });
    }
    let mut schedule = settings.schedule;
    schedule.total_steps = planned;
    if schedule.warmup_steps == 0 {
        schedule.warmup_steps = (settings.warmup_ratio * planned as f64).ceil() as usize;
    }
    let mut run = Run {
        model,
        arena,
        data,
        settings,
        schedule,
        metrics,
        observer,
        stop,
        steps_per_epoch,
        mapped_bytes: mapped_bytes(model),
        failed_in_a_row: 0,
        updates: 0,
        supervised: 0,
        summary: Summary { planned_steps: planned, ..Summary::default() },
    };
    run.observer.start(planned);
    run.summary.eval_loss_before = run.evaluate()?;
    run.epochs()?;
    let evaluated =
        settings.eval_steps > 0 && run.summary.steps > 0 && run.summary.steps.is_multiple_of(settings.eval_steps);
    if !evaluated {
        run.summary.eval_loss_after = run.evaluate()?;
    }
    Ok(run.summary)
}

struct Run<'a> {
    model: &'a dyn CausalLMModel,
    arena: &'a Arena,
    data: &'a TrainingData<'a>,
    settings: &'a LoopSettings,
    schedule: Schedule,
    metrics: &'a mut MetricsFile,
    observer: &'a mut dyn Observer,
    stop: &'a AtomicBool,
    steps_per_epoch: usize,
    mapped_bytes: u64,
    failed_in_a_row: usize,
    updates: u64,
    supervised: u64,
    summary: Summary,
}

impl Run<'_> {
    fn epochs(&mut self) -> Result<()> {
        for epoch in 0.. {
            let mut batches = self.data.order.epoch(epoch);
            loop {
                let group: Vec<Vec<usize>> = batches.by_ref().take(self.settings.gradient_accumulation_steps).collect();
                if group.is_empty() {
                    break;
                }
                if self.summary.steps == self.summary.planned_steps {
                    return Ok(());
                }
                if self.stop.load(Ordering::Relaxed) {
                    self.summary.interrupted = true;
                    return Ok(());
                }
                self.step(&group)?;
                let every = self.settings.eval_steps;
                if every > 0 && self.summary.steps.is_multiple_of(every) {
                    self.summary.eval_loss_after = self.evaluate()?;
                }
            }
        }
        Ok(())
    }

    fn step(&mut self, group: &[Vec<usize>]) -> Result<()> {
        let read = |batch: &Vec<usize>| batch.iter().map(|&row| self.data.rows.get(row)).collect();
        let rows: Vec<Vec<Example>> = group.iter().map(read).collect::<Result<_, _>>()?;
        let batches: Vec<MicroBatch> = rows.iter().map(|batch| batch.iter().collect()).collect();
        let step = self.summary.steps;
        let learning_rate = self.schedule.at(step);
        let started = Instant::now();
        let result =
            train_step(self.model, self.arena, &batches, step, learning_rate, self.updates + 1, &self.settings.step)?;
        let seconds = started.elapsed().as_secs_f64();
        self.summary.steps += 1;
        self.summary.tokens += result.tokens;
        self.summary.seconds += seconds;
        self.supervised += result.supervised_tokens;
        self.count_failure(result.applied)?;
        let metrics = StepMetrics {
            step: self.summary.steps,
            epoch: self.epoch(),
            loss: result.loss,
            grad_norm: result.grad_norm,
            learning_rate,
            tokens: self.summary.tokens,
            supervised_tokens: self.supervised,
            tokens_per_second: result.tokens as f64 / seconds,
            peak_memory_bytes: device::peak_bytes(&self.model.device())? + self.mapped_bytes,
        };
        self.metrics.write(&metrics)?;
        self.observer.step(&metrics);
        Ok(())
    }

    fn count_failure(&mut self, applied: bool) -> Result<()> {
        if applied {
            self.updates += 1;
            self.failed_in_a_row = 0;
            return Ok(());
        }
        self.failed_in_a_row += 1;
        self.summary.skipped_steps += 1;
        let step = self.summary.steps;
        self.observer.note(&format!("step {step} was left out: its loss or gradient is not finite"));
        if self.failed_in_a_row == TOLERATED {
            return Err(Error::Diverged { step, steps: TOLERATED });
        }
        Ok(())
    }

    fn epoch(&self) -> f64 {
        self.summary.steps as f64 / self.steps_per_epoch as f64
    }

    /// The mean loss over the supervised tokens of the evaluation rows; nothing where there are none or the run is to stop.
    fn evaluate(&mut self) -> Result<Option<f64>> {
        let (mut sum, mut tokens) = (0.0, 0);
        for batch in eval_batches(&self.data.eval_rows.lengths()?) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let rows = batch.map(|row| self.data.eval_rows.get(row)).collect::<Result<Vec<_>, _>>()?;
            let (loss, supervised) = evaluate_rows(self.model, &rows.iter().collect::<Vec<_>>())?;
            sum += loss;
            tokens += supervised;
        }
        if tokens == 0 {
            return Ok(None);
        }
        let loss = sum / tokens as f64;
        let metrics =
            EvalMetrics { step: self.summary.steps, epoch: self.epoch(), eval_loss: loss, eval_tokens: tokens };
        self.metrics.write(&metrics)?;
        self.observer.eval(&metrics);
        Ok(Some(loss))
    }
}

/// Rows in file order, together as long as they have at most [`EVAL_TOKENS`] tokens.
fn eval_batches(lengths: &[u32]) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut held = 0;
    for (row, &length) in lengths.iter().enumerate() {
        held += length as usize;
        match batches.last_mut() {
            Some(batch) if held <= EVAL_TOKENS => batch.end = row + 1,
            _ => {
                held = length as usize;
                batches.push(row..row + 1);
            }
        }
    }
    batches
}

/// Bytes of weights that lie in mapped files.
fn mapped_bytes(model: &dyn CausalLMModel) -> u64 {
    let weights = model.named_weights().into_iter();
    weights.filter(|(_, w)| matches!(w, pmetal_ops::Weight::Mapped(_))).map(|(_, w)| w.size_in_bytes() as u64).sum()
}
