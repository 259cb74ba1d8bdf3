"""How far bf16 takes the losses of LoRA steps from those in f32, in transformers, PEFT and torch's autocast: what the tolerance of
crates/pmetal/tests/device_parity/training.rs is taken from. Prints the largest relative difference over 50 steps.

    python -m parity.half_losses        (in scripts/, with scripts/requirements.txt)
"""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2] / "crates"
STEPS, RATE = 50, 1e-3


def rows():
    lines = (ROOT / "pmetal-trainer/tests/fixtures/rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(name, dtype, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "pmetal-models/tests/fixtures" / name, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    narrow = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
    data, log = rows(), []
    for step in range(STEPS):
        batch = [data[(4 * step + k) % len(data)] for k in range(4)]
        count = sum(label >= 0 for row in batch for label in row["labels"][1:])
        total = 0.0
        for row in batch:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            with narrow:
                logits = model(input_ids=ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[1:], ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(total)
    return log


for name in ("llama", "qwen3"):
    for seed in range(3):
        exact, rounded = losses(name, torch.float32, seed), losses(name, torch.bfloat16, seed)
        worst = max(abs(a - b) / a for a, b in zip(exact, rounded))
        print(f"{name}, seed {seed}: loss {exact[0]:.4f} to {exact[-1]:.4f}, bf16 off by {worst:.1e}")
