"""Eight optimizer steps as PEFT, transformers' schedules and torch's AdamW take them.

crates/pmetal-trainer/tests/fixtures/
    rows.jsonl              16 rows of unequal length, {"input_ids", "labels"}, labels -100 on the prompt
    sft-{lora,full}/MODEL/  MODEL names a folder of crates/pmetal-models/tests/fixtures
        start_adapter/      (lora) the adapter the runs start from
        expected.json       per run: settings, losses, grad_norms (before clipping), learning_rates (used by the step)
        RUN_adapter/        (lora, some) the adapter after run RUN
        RUN.safetensors     (full, some) the weights after run RUN
Rows are taken in file order, no shuffling. A step's loss is the sum over its targets in all its micro-batches, divided by their
number. Weight decay reaches every trained tensor, norms included, as torch.optim.AdamW does by default.
The families beyond Llama and Qwen have the run `linear` alone, and no weights after it: eight losses and norms hold the first seven
updates. Nothing there turns on a near tie: experts and tokens are chosen with a margin at every step.
"""

import json
import shutil

import torch
from safetensors.torch import save_file
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from parity.checks import NearTie, refusing_near_ties
from parity.families import FIXTURES
from parity.lora import RANK_FOUR, save_adapter, with_random_adapter
from parity.loss import summed_loss
from parity.store import home

STEPS, WARMUP = 8, 2
COMMON = dict(
    learning_rate=1e-3, weight_decay=0.01, beta1=0.9, beta2=0.999, epsilon=1e-8, max_grad_norm=1.0, warmup_steps=WARMUP,
    steps=STEPS, batch_size=2,
)
RUNS = {
    "linear": dict(COMMON, scheduler="linear", gradient_accumulation_steps=1, epochs=1),
    "accumulated": dict(COMMON, scheduler="linear", gradient_accumulation_steps=2, epochs=2),
    "cosine": dict(COMMON, scheduler="cosine", gradient_accumulation_steps=1, epochs=1),
}
LORA_LOSSES = (
    "llama-yarn", "llama4-text", "qwen2-window-hub", "qwen3-moe", "deepseek-v3", "deepseek-v32", "mistral-window-hub",
    "mixtral-hub", "gemma2", "gemma3-text", "phi3-window-hub", "gpt-oss", "granite", "granitemoe", "cohere", "cohere2",
)
FULL_LOSSES = ("qwen3-moe", "gemma2", "deepseek-v3", "gpt-oss", "cohere")
TRAINED_MARGIN = 1e-4
SCHEDULES = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def make_rows(vocab=96, count=16):
    """Rows of 5 to 24 tokens with a prompt of 0 to 6 unsupervised ones."""
    generator = torch.Generator().manual_seed(21)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    rows = []
    for index in range(count):
        ids = torch.randint(3, vocab, (draw(5, 25),), generator=generator)
        labels = ids.clone()
        labels[:min(index % 7, len(ids) - 2)] = -100
        rows.append((ids, labels))
    return rows


def train(model, rows, settings):
    """Runs the steps in place; the trained tensors are those that require a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (settings["beta1"], settings["beta2"])
    optimizer = torch.optim.AdamW(
        trained, lr=settings["learning_rate"], betas=betas, eps=settings["epsilon"], weight_decay=settings["weight_decay"]
    )
    schedule = SCHEDULES[settings["scheduler"]](optimizer, WARMUP, STEPS)
    log = {"losses": [], "grad_norms": [], "learning_rates": []}
    width = settings["batch_size"] * settings["gradient_accumulation_steps"]
    for step in range(STEPS):
        chosen = [rows[(step * width + i) % len(rows)] for i in range(width)]
        targets = sum(int((labels[1:] != -100).sum()) for _, labels in chosen)
        loss = 0.0
        for at in range(0, width, settings["batch_size"]):
            micro = chosen[at:at + settings["batch_size"]]
            total, _, _ = summed_loss(model, [ids for ids, _ in micro], [labels for _, labels in micro])
            (total / targets).backward()
            loss += total.item() / targets
        norm = torch.nn.utils.clip_grad_norm_(trained, settings["max_grad_norm"])
        log["losses"].append(loss)
        log["grad_norms"].append(norm.item())
        log["learning_rates"].append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return log


def write_lora(folder, model_folder, load, rows, zero_b):
    """All runs of one model from one start adapter."""
    expected = {}
    for run, settings in RUNS.items():
        adapted = with_random_adapter(load(model_folder), seed=31, zero_b=zero_b, **RANK_FOUR)
        save_adapter(adapted, folder / "start_adapter", base=model_folder.name)
        expected[run] = {"settings": settings, **train(adapted, rows, settings)}
        save_adapter(adapted, folder / f"{run}_adapter", base=model_folder.name)
    return expected


def write_full(folder, model_folder, load, rows):
    """The plain run of one model with every weight trained."""
    settings = RUNS["linear"]
    model = load(model_folder)
    log = train(model, rows, settings)
    folder.mkdir(parents=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "linear.safetensors")
    return {"linear": {"settings": settings, **log}}


def write_lora_losses(folder, model_folder, load, rows):
    """The plain run from the first start adapter whose steps turn on no near tie."""
    settings = RUNS["linear"]
    for seed in range(31, 131):
        adapted = with_random_adapter(load(model_folder), seed=seed, **FIXTURES[model_folder.name].lora)
        save_adapter(adapted, folder / "start_adapter", base=model_folder.name)
        try:
            with refusing_near_ties(TRAINED_MARGIN):
                return {"linear": {"settings": settings, **train(adapted, rows, settings)}}
        except NearTie:
            continue
    raise NearTie(model_folder.name)


def write_full_losses(folder, model_folder, load, rows):
    """The plain run with every weight trained.

    A margin between probabilities is small where one expert has nearly all: a fifth of it is taken if need be.
    """
    settings = RUNS["linear"]
    folder.mkdir(parents=True)
    for margin in (TRAINED_MARGIN, TRAINED_MARGIN / 5):
        try:
            with refusing_near_ties(margin):
                return {"linear": {"settings": settings, **train(load(model_folder), rows, settings)}}
        except NearTie:
            continue
    raise NearTie(model_folder.name)


def jobs():
    """Kind of run, checkpoint, and what writes it."""
    yield "sft-lora", "llama", lambda *a: write_lora(*a, zero_b=True)
    yield "sft-lora", "qwen3", lambda *a: write_lora(*a, zero_b=False)
    yield "sft-full", "llama-tied", write_full
    yield "sft-full", "qwen3", write_full
    yield from (("sft-lora", name, write_lora_losses) for name in LORA_LOSSES)
    yield from (("sft-full", name, write_full_losses) for name in FULL_LOSSES)


def write_all(models, load):
    """Writes every training fixture; `models` is the folder of checkpoints and `load` opens one in f32."""
    root = models.parents[2] / "pmetal-trainer/tests/fixtures"
    rows = make_rows()
    root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) for ids, labels in rows]
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for kind, model, write in jobs():
        folder = root / kind / model
        shutil.rmtree(folder, ignore_errors=True)
        expected = write(folder, home(model), load, rows)
        (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
        for run, log in expected.items():
            print(f"{kind}/{model}/{run}: loss {log['losses'][0]:.5f} to {log['losses'][-1]:.5f}")
