//! The main job on what the repository carries: teach a small chat model to answer orders in JSON, and show what changed.
//!
//! `cargo run --release --example quickstart`

use std::{error::Error, fs, ops::ControlFlow, path::Path, sync::atomic::AtomicBool};

use candle_core::{DType, Device};
use pmetal::{
    data::{Message, Template, TemplateChoice, Tokenizer},
    lora::{AdapterFile, Use, attach_file},
    memory::PoolAllocator,
    models::{CausalLMModel, Checkpoint, SamplingParams, generate, load},
    trainer::{Observer, SftOptions, StepMetrics, sft},
};

#[global_allocator]
static ALLOCATOR: PoolAllocator = PoolAllocator;

/// Prompts that are printed with both answers.
const SHOWN: usize = 6;

/// A prompt and the answer that is right.
struct Question {
    prompt: String,
    answer: String,
}

struct Lines;

impl Observer for Lines {
    fn step(&mut self, m: &StepMetrics) {
        if m.step.is_multiple_of(50) {
            println!("  step {:4}  loss {:.4}  {:.0} tok/s", m.step, m.loss, m.tokens_per_second);
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/quickstart").canonicalize()?;
    let (base, output) = (assets.join("base"), Path::new("output/quickstart"));
    let questions = read_questions(&assets.join("heldout.jsonl"))?;
    let tokenizer = Tokenizer::from_model_path(&base)?;
    let checkpoint = Checkpoint::open(&base)?;
    let mut model = load(&checkpoint, DType::F32, &Device::Cpu, None)?;

    println!("answering {} held-out prompts before fine-tuning …", questions.len());
    let before = answers(model.as_ref(), &tokenizer, &questions)?;

    println!("fine-tuning with LoRA …");
    let mut options = SftOptions::new(&base, assets.join("train.jsonl"))?;
    options.eval_dataset = Some(assets.join("heldout.jsonl"));
    options.output = output.to_path_buf();
    options.learning_rate = 2e-3;
    options.epochs = 4.0;
    options.batch_size = 8;
    let outcome = sft(&options, &mut Lines, &AtomicBool::new(false))?;

    println!("answering the same prompts after it …\n");
    attach_file(model.as_mut(), &AdapterFile::open(output)?, Use::Inference)?;
    let after = answers(model.as_ref(), &tokenizer, &questions)?;

    for ((question, before), after) in questions.iter().zip(&before).zip(&after).take(SHOWN) {
        println!("> {}\n  before: {before}\n  after:  {after}", question.prompt);
    }
    let right = |answers: &[String]| answers.iter().zip(&questions).filter(|(a, q)| **a == q.answer).count();
    let summary = &outcome.summary;
    println!("\n{} steps in {:.0} s, {} tokens", summary.steps, summary.seconds, summary.tokens);
    if let (Some(before), Some(after)) = (summary.eval_loss_before, summary.eval_loss_after) {
        println!("held-out loss:           {before:.4} before, {after:.4} after");
    }
    println!(
        "held-out answers right:  {} of {n} before, {} of {n} after",
        right(&before),
        right(&after),
        n = questions.len()
    );
    println!("adapter:                 {}", output.display());
    Ok(())
}

fn read_questions(path: &Path) -> Result<Vec<Question>, Box<dyn Error>> {
    let read = |line: &str| -> Result<Question, Box<dyn Error>> {
        let row: serde_json::Value = serde_json::from_str(line)?;
        let turn = |i: usize| row["messages"][i]["content"].as_str().unwrap_or_default().to_owned();
        Ok(Question { prompt: turn(0), answer: turn(1) })
    };
    fs::read_to_string(path)?.lines().map(read).collect()
}

fn answers(
    model: &dyn CausalLMModel,
    tokenizer: &Tokenizer,
    questions: &[Question],
) -> Result<Vec<String>, Box<dyn Error>> {
    let template = Template::choose(&TemplateChoice::Auto, tokenizer)?;
    let stop_ids: Vec<u32> = tokenizer.eos_id().into_iter().chain(template.end_of_turn(tokenizer)).collect();
    let params = SamplingParams { max_tokens: 64, ..SamplingParams::default() };
    let answer = |question: &Question| -> Result<String, Box<dyn Error>> {
        let text = template.render(&[Message::new("user", &question.prompt)], true)?;
        let ids = tokenizer.encode(&text, false)?;
        let generation = generate(model, &ids, &params, &stop_ids, &mut |_| ControlFlow::Continue(()))?;
        Ok(tokenizer.decode(&generation.tokens)?)
    };
    questions.iter().map(answer).collect()
}
