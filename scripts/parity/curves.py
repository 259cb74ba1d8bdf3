"""Losses of fifty LoRA steps in transformers, PEFT and torch's AdamW: crates/pmetal/tests/device_parity/peft_curves.json.

    python -m parity.curves        (in scripts/, with scripts/requirements.txt)

For each model: the losses in f32, and those of a bf16 model under torch's autocast with adapters in f32. `llama` and `qwen3` are the
checkpoints of crates/pmetal-models/tests/fixtures on the rows of pmetal-trainer's; `wide` has widths that take the same way through the
kernels as a real model's. Its weights and rows, and every adapter's A, are no files but a formula, which the test has too: number i of what
is called NAME (for an adapter model.layers.0.mlp.up_proj.lora_A.weight and so on) is (2 u - 1) * bound in f32, where u is number i of
SplitMix64's stream of seed FNV-1a(NAME), its upper 24 bits as a fraction. B starts as zero, norms are one. Token i of row r of `wide` is
floor(u * vocabulary) of the stream of seed r.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2] / "crates"
OUT = ROOT / "pmetal/tests/device_parity/peft_curves.json"
STEPS, RATE, BATCH = 50, 1e-3, 4
BOUND = 0.08
WIDE = dict(
    model_type="qwen3", hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=128, vocab_size=512, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
    initializer_range=0.02, hidden_act="silu",
)
MASK = (1 << 64) - 1


def fractions(seed, count):
    """The first numbers of a stream of SplitMix64, in [0, 1), f32."""
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def named(name, shape, bound):
    """What the formula makes of a name."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 & MASK
    numbers = np.float32(2.0) * fractions(seed, math.prod(shape)) - np.float32(1.0)
    return torch.from_numpy(numbers * np.float32(bound)).reshape(shape)


def fixture_rows():
    """Ids and labels of the trainer's rows."""
    lines = (ROOT / "pmetal-trainer/tests/fixtures/rows.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [(row["input_ids"], row["labels"]) for row in rows]


def wide_rows():
    """16 rows of 48 to 143 tokens, each a target."""
    lengths = [48 + 37 * r % 96 for r in range(16)]
    ids = [(fractions(r, length) * np.float32(WIDE["vocab_size"])).astype(int).tolist() for r, length in enumerate(lengths)]
    return [(row, row) for row in ids]


def model(name, dtype):
    if name != "wide":
        return AutoModelForCausalLM.from_pretrained(ROOT / "pmetal-models/tests/fixtures" / name, dtype=dtype)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**WIDE))
    for key, parameter in made.named_parameters():
        shape = tuple(parameter.shape)
        parameter.data = torch.ones(shape) if "norm" in key else named(key, shape, BOUND)
    return made.to(dtype)


def adapted(base):
    """The model with an adapter of rank 16 on every linear layer, as PEFT draws it."""
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def start(lora):
    """Gives every A the formula's numbers, with the bound of PEFT's own."""
    for key, parameter in lora.named_parameters():
        if "lora_A" in key:
            shape = tuple(parameter.shape)
            parameter.data = named(key.removeprefix("base_model.model.").replace(".default", ""), shape, 1 / math.sqrt(shape[1]))
    return lora


def losses(lora, rows, dtype):
    """Losses of the steps, four rows each in turn, padding none: a step's is the mean over its targets."""
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    narrow = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
    log = []
    for step in range(STEPS):
        batch = [rows[(BATCH * step + k) % len(rows)] for k in range(BATCH)]
        count = sum(label >= 0 for _, labels in batch for label in labels[1:])
        total = 0.0
        for ids, labels in batch:
            with narrow:
                logits = lora(input_ids=torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            loss = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(total)
    return log


def furthest(exact, rounded):
    """The largest relative difference."""
    return max(abs(a - b) / a for a, b in zip(exact, rounded))


def main():
    curves = {"wide_config": WIDE}
    for name, rows in (("llama", fixture_rows()), ("qwen3", fixture_rows()), ("wide", wide_rows())):
        exact, rounded = (losses(start(adapted(model(name, dtype))), rows, dtype) for dtype in (torch.float32, torch.bfloat16))
        curves[name] = {"f32": [round(loss, 7) for loss in exact], "bf16": [round(loss, 7) for loss in rounded]}
        print(f"{name}: loss {exact[0]:.4f} to {exact[-1]:.4f}, bf16 off by {furthest(exact, rounded):.1e}")
    OUT.write_text(json.dumps(curves) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
