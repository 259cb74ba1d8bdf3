//! One optimizer step, and the loss of rows without one.

use pmetal_data::Example;
use pmetal_models::{CausalLMModel, Input};
use pmetal_ops::{AdamW, Arena, Policy, adamw, backward, grad_norm, linear_cross_entropy, no_grad, random};

use crate::Result;

/// Rows that go through the model together, behind one another and without padding.
pub type MicroBatch<'a> = Vec<&'a Example>;

/// What does not change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Norm that gradients are scaled down to; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether layers are run again in backward instead of kept.
    pub checkpointing: Option<Policy>,
    /// Seeds the dropout.
    pub seed: u64,
}

/// What a step saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepResult {
    /// Mean loss over supervised tokens.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Tokens of the step.
    pub tokens: u64,
    /// Supervised ones among them.
    pub supervised_tokens: u64,
    /// False where loss or gradient was not finite and nothing was changed.
    pub applied: bool,
}

/// Takes optimizer step `step` (from 0) over micro-batches: the loss is the sum over supervised tokens of all of them divided by
/// their number, whatever way the rows are spread.
pub fn train_step(
    model: &dyn CausalLMModel,
    arena: &Arena,
    micro_batches: &[MicroBatch],
    step: usize,
    learning_rate: f64,
    optimizer_step: u64,
    settings: &StepSettings,
) -> Result<StepResult> {
    let rows = || micro_batches.iter().flatten();
    let supervised: usize = rows().map(|row| row.supervised_tokens()).sum();
    let tokens: usize = rows().map(|row| row.input_ids.len()).sum();
    let mut result =
        StepResult { tokens: tokens as u64, supervised_tokens: supervised as u64, ..StepResult::default() };
    let scale = 1.0 / supervised.max(1) as f32;
    arena.clear_grads();
    for (i, rows) in micro_batches.iter().enumerate() {
        let noise = random::mix(settings.seed, &[step as u64, i as u64]);
        let packed = Packed::new(rows);
        let input = Input { noise: Some(noise), checkpointing: settings.checkpointing, ..packed.input() };
        let hidden = model.forward(&input, None)?;
        let entropy = linear_cross_entropy(&hidden, model.head(), &packed.targets, scale)?;
        drop(hidden);
        result.loss += entropy.token_losses.iter().map(|&l| f64::from(l)).sum::<f64>() / supervised.max(1) as f64;
        backward(entropy.loss)?;
    }
    result.grad_norm = grad_norm(arena)?;
    if !(result.loss.is_finite() && result.grad_norm.is_finite()) {
        arena.clear_grads();
        return Ok(result);
    }
    // torch.nn.utils.clip_grad_norm_
    let clip = settings.max_grad_norm / (result.grad_norm + 1e-6);
    let grad_scale = if settings.max_grad_norm > 0.0 && clip < 1.0 { clip as f32 } else { 1.0 };
    let config = AdamW {
        learning_rate: learning_rate as f32,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: settings.weight_decay as f32,
        step: optimizer_step,
    };
    adamw(arena, &config, grad_scale)?;
    result.applied = true;
    Ok(result)
}

/// Sum of the losses of the rows' supervised tokens, and their number.
pub(crate) fn evaluate_rows(model: &dyn CausalLMModel, rows: &[&Example]) -> Result<(f64, u64)> {
    let packed = Packed::new(rows);
    let entropy = no_grad(|| {
        let hidden = model.forward(&packed.input(), None)?;
        Ok::<_, crate::Error>(linear_cross_entropy(&hidden, model.head(), &packed.targets, 1.0)?)
    })?;
    let sum = entropy.token_losses.iter().map(|&l| f64::from(l)).sum();
    Ok((sum, rows.iter().map(|row| row.supervised_tokens() as u64).sum()))
}

/// Rows behind one another, each token with the label of its successor.
struct Packed {
    ids: Vec<u32>,
    /// -100 at the end of each row and where the successor is not trained.
    targets: Vec<i64>,
    lengths: Vec<usize>,
}

impl Packed {
    fn new(rows: &[&Example]) -> Self {
        let mut packed = Self { ids: Vec::new(), targets: Vec::new(), lengths: Vec::with_capacity(rows.len()) };
        for row in rows {
            packed.ids.extend(&row.input_ids);
            packed.targets.extend(row.labels.iter().skip(1));
            packed.targets.push(-100);
            packed.lengths.push(row.input_ids.len());
        }
        packed
    }

    fn input(&self) -> Input<'_> {
        Input::rows(&self.ids, &self.lengths)
    }
}
