//! One optimizer step, and the loss of rows without one.

use candle_core::{DType, Tensor};
use pmetal_data::Example;
use pmetal_models::{CausalLMModel, Checkpointing, Input};
use pmetal_ops::{
    AdamW, Arena, StepOutcome, Value, adamw, backward, gradients, linear_cross_entropy, linear_cross_entropy_within,
    no_grad, random, router_loss,
};

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
    pub checkpointing: Option<Checkpointing>,
    /// Bytes of logits at a time, on a GPU.
    pub logits_bytes: usize,
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
    start_step(model, arena, micro_batches, step, learning_rate, optimizer_step, settings)?.finish()
}

/// A step that was asked of the device, which may still be at it.
pub struct StartedStep {
    outcome: StepOutcome,
    /// Of each micro-batch, those of its supervised tokens.
    token_losses: Vec<Tensor>,
    /// Of each micro-batch, its share of what balances the experts, where the model asks for that.
    router_losses: Vec<Tensor>,
    tokens: u64,
    supervised_tokens: u64,
}

impl StartedStep {
    /// What the step saw. Waits for the device.
    pub fn finish(self) -> Result<StepResult> {
        let (grad_norm, applied) = self.outcome.read()?;
        let sum = self.token_losses.iter().map(sum_of).sum::<Result<f64>>()?;
        let (tokens, supervised_tokens) = (self.tokens, self.supervised_tokens);
        let balance = self.router_losses.iter().map(|loss| Ok(f64::from(loss.to_scalar::<f32>()?)));
        let loss = sum / supervised_tokens.max(1) as f64 + balance.sum::<Result<f64>>()?;
        Ok(StepResult { loss, grad_norm, tokens, supervised_tokens, applied })
    }
}

/// [`train_step`] without waiting for its result: nothing on the way reads from the device.
pub fn start_step(
    model: &dyn CausalLMModel,
    arena: &Arena,
    micro_batches: &[MicroBatch],
    step: usize,
    learning_rate: f64,
    optimizer_step: u64,
    settings: &StepSettings,
) -> Result<StartedStep> {
    let rows = || micro_batches.iter().flatten();
    let supervised: usize = rows().map(|row| row.supervised_tokens()).sum();
    let tokens: usize = rows().map(|row| row.input_ids.len()).sum();
    let scale = 1.0 / supervised.max(1) as f32;
    let (mut token_losses, mut router_losses) = (Vec::with_capacity(micro_batches.len()), Vec::new());
    let mut loss = Tensor::zeros((), DType::F32, &model.device())?;
    arena.clear_grads();
    for (i, rows) in micro_batches.iter().enumerate() {
        let noise = random::mix(settings.seed, &[step as u64, i as u64]);
        let packed = Packed::new(rows);
        let input = Input { noise: Some(noise), checkpointing: settings.checkpointing, ..packed.input() };
        let (hidden, routers) = model.forward_with_routers(&input, None)?;
        let (head, spec) = (model.head(), model.logits_spec());
        let entropy = linear_cross_entropy_within(settings.logits_bytes, &hidden, head, &packed.targets, scale, spec)?;
        drop(hidden);
        loss = (loss + entropy.loss.tensor())?;
        token_losses.push(entropy.token_losses);
        let Some(balance) = router_balance(model, &routers)? else {
            backward(entropy.loss)?;
            continue;
        };
        let share = balance.coefficient / micro_batches.len() as f64;
        let weight = (balance.loss.tensor().ones_like()? * share)?;
        let weighted = (balance.loss.tensor() * share)?;
        loss = (loss + &weighted)?;
        router_losses.push(weighted);
        let one = entropy.loss.tensor().ones_like()?;
        gradients(vec![(entropy.loss, one), (balance.loss, weight)], &[])?;
    }
    let config = AdamW {
        learning_rate: learning_rate as f32,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: settings.weight_decay as f32,
        step: optimizer_step,
    };
    let outcome = adamw(arena, &config, settings.max_grad_norm, &loss)?;
    Ok(StartedStep {
        outcome,
        token_losses,
        router_losses,
        tokens: tokens as u64,
        supervised_tokens: supervised as u64,
    })
}

/// What keeps tokens from crowding at few experts, and its factor in the loss.
struct Balance {
    loss: Value,
    coefficient: f64,
}

/// None where the model does not ask for it.
fn router_balance(model: &dyn CausalLMModel, routers: &[Value]) -> Result<Option<Balance>> {
    let spec = model.spec();
    let (Some(coefficient), Some(router)) = (spec.router_loss, spec.router()) else { return Ok(None) };
    Ok(Some(Balance { loss: router_loss(routers, router)?, coefficient }))
}

fn sum_of(losses: &Tensor) -> Result<f64> {
    Ok(losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}

/// Sum of the losses of the rows' supervised tokens, and their number.
pub(crate) fn evaluate_rows(model: &dyn CausalLMModel, rows: &[&Example]) -> Result<(f64, u64)> {
    let packed = Packed::new(rows);
    let entropy = no_grad(|| {
        let hidden = model.forward(&packed.input(), None)?;
        Ok::<_, crate::Error>(linear_cross_entropy(&hidden, model.head(), &packed.targets, 1.0, model.logits_spec())?)
    })?;
    Ok((sum_of(&entropy.token_losses)?, rows.iter().map(|row| row.supervised_tokens() as u64).sum()))
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
