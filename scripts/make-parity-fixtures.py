"""Writes the tiny checkpoints, and what transformers and PEFT compute with them, that the parity tests read.

    pip install -r scripts/requirements.txt     # torch 2.15.0, transformers 5.23.0, peft 0.21.2
    python scripts/make-parity-fixtures.py [NAME ...]

Each folder of crates/pmetal-models/tests/fixtures is an ordinary Hugging Face folder plus `expected.safetensors`:
    ids.N            i64 [len]         three rows of unequal length
    logits.N         f32 [len, vocab]  the row alone through the model, stored weights widened to f32, eager attention
    greedy.0         i64 [8]           greedy continuation of row 0, each token from a forward of all before it
    lora_logits.N    f32 [len, vocab]  with the adapter in `adapter/` (B not zero)
    loss             f32 []            adapter on, the three rows right-padded: summed next-token loss / number of targets;
                                       each row alone where frequencies depend on the length; with the routers' loss times
                                       its coefficient where the config has `output_router_logits`
    aux_loss         f32 []            (some) the routers' loss of the same forward, before the coefficient
    grad.NAME        f32               gradient of that loss, NAME as in adapter_model.safetensors
    full_grad.NAME   f32               (some) gradient of the same loss without the adapter, for every weight that has one; NAME
                                       as in `named_parameters` of the transformers model, which holds experts fused:
                                       `mlp.experts.gate_up_proj` [E, 2I, H] (gate first) and `mlp.experts.down_proj` [E, H, I];
                                       GPT-OSS has [E, H, 2I] (gate and up take turns) and [E, I, H]. `full_loss` and, some,
                                       `full_aux_loss` beside it
    rslora_logits.N  f32 [len, vocab]  (some) with `adapter-rslora/` (rsLoRA, r 8, alpha 8, q_proj and v_proj)
    per_expert_logits.N  likewise      (some) with `adapter-per-expert/`; see `parity/per_expert.py`
The checkpoints are listed in `parity/families/`.
The folders of crates/pmetal-trainer/tests/fixtures hold eight optimizer steps; see `parity/sft.py`.
Those of crates/pmetal-lora/tests/fixtures hold adapters with an embedding or a head; see `parity/tables.py`.
"""

import shutil
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from parity import per_expert, sft, tables
from parity.checks import NearTie, assert_switches_act, refusing_near_ties
from parity.families import FIXTURES
from parity.fixture import SIZES
from parity.lora import peft_gradients, save_adapter, with_random_adapter
from parity.loss import loss_of_rows_apart, padded_loss
from parity.store import LANDED, home, load, save_checkpoint


@torch.no_grad()
def row_logits(model, rows):
    return [model(row[None]).logits[0].clone() for row in rows]


@torch.no_grad()
def greedy(model, row, steps=8):
    """Greedy continuation without a cache; refuses a choice too close to call."""
    ids = row.clone()
    for _ in range(steps):
        best = model(ids[None]).logits[0, -1].sort(descending=True)
        if best.values[0] - best.values[1] <= 5e-3:
            raise NearTie
        ids = torch.cat([ids, best.indices[:1]])
    return ids[len(row):]


def numbered(name, tensors):
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}


def full_gradients(model, rows, loss_of):
    loss, aux = loss_of(model, rows)
    loss.backward()
    tensors = {f"full_grad.{key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    tensors["full_loss"] = loss.detach()
    return tensors | ({} if aux is None else {"full_aux_loss": aux.detach()})


def adapter(name, spec, folder, rows, loss_of):
    """Writes the adapter; its logits, loss and gradients."""
    adapted = with_random_adapter(load(folder), seed=11, **spec.lora)
    save_adapter(adapted, folder / "adapter", base=name)
    tensors = numbered("lora_logits", row_logits(adapted, rows))
    loss, aux = loss_of(adapted, rows)
    loss.backward()
    again = PeftModel.from_pretrained(load(folder), folder / "adapter")
    for got, want in zip(row_logits(again, rows), row_logits(adapted, rows)):
        assert torch.allclose(got, want, atol=1e-5), "PEFT reads another adapter than it wrote"
    gradients = peft_gradients(adapted)
    assert gradients.keys() == load_file(folder / "adapter/adapter_model.safetensors").keys()
    tensors |= {f"grad.{key}": gradient for key, gradient in gradients.items()} | {"loss": loss.detach()}
    return tensors | ({} if aux is None else {"aux_loss": aux.detach()})


def per_expert_adapter(name, folder, rows):
    """PEFT's logits with the old adapter, which must be those of the merged weights."""
    old = per_expert.write_adapter(load(folder), folder / "adapter-per-expert", name)
    logits = row_logits(PeftModel.from_pretrained(load(folder), folder / "adapter-per-expert"), rows)
    for got, want in zip(row_logits(per_expert.merged(load(folder), old), rows), logits):
        assert torch.allclose(got, want, atol=1e-4), (got - want).abs().max()
    return numbered("per_expert_logits", logits)


def expectations(name, spec, folder):
    """Everything expected.safetensors holds for one fixture; writes its adapters on the way."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator) for length in spec.lengths]
    model = load(folder)
    logits = row_logits(model, rows)
    tensors = numbered("ids", rows) | numbered("logits", logits) | {"greedy.0": greedy(model, rows[0])}
    loss_of = loss_of_rows_apart if spec.apart else padded_loss
    if spec.full_gradients:
        tensors |= full_gradients(model, rows, loss_of)
    tensors |= adapter(name, spec, folder, rows, loss_of)
    if spec.rslora:
        adapted = with_random_adapter(
            load(folder), seed=13, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True
        )
        save_adapter(adapted, folder / "adapter-rslora", base=name)
        tensors |= numbered("rslora_logits", row_logits(adapted, rows))
    if spec.per_expert:
        tensors |= per_expert_adapter(name, folder, rows)
    assert_switches_act(spec, lambda config: load(folder, config), rows, logits)
    return tensors


def write(name):
    """Writes one fixture with the first seed whose choices rounding can't turn."""
    spec, folder = FIXTURES[name], home(name)
    for seed in range(spec.first_seed(name), spec.first_seed(name) + 200):
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(name, seed, folder)
        try:
            with refusing_near_ties():
                return expectations(name, spec, folder)
        except NearTie:
            continue
    raise NearTie(name)


def main():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in sys.argv[1:] or FIXTURES:
        tensors = write(name)
        save_file({key: value.contiguous() for key, value in tensors.items()}, home(name) / "expected.safetensors")
        spread = tensors["logits.1"].std().item()
        size = sum(path.stat().st_size for path in home(name).rglob("*") if path.is_file()) // 1000
        print(f"{name}: {len(tensors)} tensors, {size} KB, loss {tensors['loss'].item():.5f}, logits' deviation {spread:.2f}")
    if len(sys.argv) == 1:
        sft.write_all(LANDED, load)
        tables.write_all(LANDED, load)


if __name__ == "__main__":
    main()
