//! Learning rates over a run, as `transformers` has them.

use clap::ValueEnum;

/// How the learning rate moves after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Straight down to zero.
    #[default]
    Linear,
    /// Half a cosine down to zero.
    Cosine,
    /// It stays.
    Constant,
}

/// A learning rate for each step of a run.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Its shape after warm-up.
    pub kind: SchedulerType,
    /// The highest learning rate.
    pub peak: f64,
    /// Steps in which it rises from zero.
    pub warmup_steps: usize,
    /// Steps of the run.
    pub total_steps: usize,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / rest).min(1.0);
        self.peak
            * match self.kind {
                SchedulerType::Linear => 1.0 - progress,
                SchedulerType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
                SchedulerType::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ```python
    /// p = torch.nn.Parameter(torch.zeros(1)); opt = torch.optim.SGD([p], lr=1.0)
    /// for make in (transformers.get_linear_schedule_with_warmup, transformers.get_cosine_schedule_with_warmup):
    ///     s = make(opt, 2, 6); lrs = []
    ///     for _ in range(6): lrs.append(s.get_last_lr()[0]); opt.step(); s.step()
    /// ```
    #[test]
    fn as_transformers_schedules() {
        let run = |kind| {
            let s = Schedule { kind, peak: 1.0, warmup_steps: 2, total_steps: 6 };
            (0..6).map(|i| s.at(i)).collect::<Vec<_>>()
        };
        let close = |got: Vec<f64>, want: [f64; 6]| {
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} {want:?}");
        };
        close(run(SchedulerType::Linear), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        close(run(SchedulerType::Cosine), [0.0, 0.5, 1.0, 0.853_553, 0.5, 0.146_447]);
        close(run(SchedulerType::Constant), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
    }
}
