"""How far bf16 takes the losses of LoRA steps from those in f32, in transformers, PEFT and torch's autocast: what the tolerance of
crates/pmetal/tests/device_parity/training.rs is taken from. Prints the largest relative difference over 50 steps.

    python -m parity.half_losses        (in scripts/, with scripts/requirements.txt)
"""

import torch

from parity.curves import adapted, fixture_rows, furthest, losses, model


def drawn(name, dtype, seed):
    torch.manual_seed(seed)
    return losses(adapted(model(name, dtype)), fixture_rows(), dtype)


for name in ("llama", "qwen3"):
    for seed in range(3):
        exact, rounded = drawn(name, torch.float32, seed), drawn(name, torch.bfloat16, seed)
        print(f"{name}, seed {seed}: loss {exact[0]:.4f} to {exact[-1]:.4f}, bf16 off by {furthest(exact, rounded):.1e}")
