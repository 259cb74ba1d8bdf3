//! Supervised fine-tuning: steps, schedules, evaluation, metrics, and the whole run from paths to paths.
//!
//! [`sft`] is the run that `pmetal train` makes. Below it, [`train`] is the loop over rows that are in memory already, and [`train_step`]
//! one optimizer step.

mod columns;
mod data_options;
mod error;
mod memory;
mod metrics;
mod options;
mod outline;
mod plan;
mod read_back;
mod rows;
mod schedule;
mod sft;
mod step;
mod trainer;
mod vocabulary;

pub use data_options::DataOptions;
pub use error::{Error, Result};
pub use memory::{MemoryChoice, StepSize, parse_bytes};
pub use metrics::{EvalMetrics, MetricsFile, Observer, StepMetrics};
pub use options::{FineTuneType, SftOptions};
pub use outline::{Method, Outline, outline};
pub use plan::{Memory, Plan, plan};
pub use schedule::{Schedule, SchedulerType};
pub use sft::{Outcome, Written, sft};
pub use step::{MicroBatch, StartedStep, StepResult, StepSettings, start_step, train_step};
pub use trainer::{Epochs, LoopSettings, Summary, TrainingData, train};
