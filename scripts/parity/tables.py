"""Adapters that carry an embedding or a head, as PEFT makes, saves, reads and trains them.

crates/pmetal-lora/tests/fixtures/CASE/
    adapter/              the folder PEFT wrote; `base_model_name_or_path` names a folder of crates/pmetal-models/tests/fixtures
    expected.safetensors  ids.N, logits.N    three rows, and their logits where PEFT opened the folder again
                          loss, grad.NAME    the mean next-token loss of the rows, and its gradient for every trained tensor
                          resized            (grown) the base's embedding as transformers resized it, before PEFT
    expected.json         (some) eight optimizer steps from the adapter, as in `sft.py`
    end_adapter/          (some) the adapter after them
"""

import json
import shutil
from dataclasses import dataclass

import torch
from peft import PeftModel
from safetensors.torch import save_file

from parity import sft
from parity.lora import save_adapter, with_random_adapter
from parity.loss import padded_loss

GROWN = 99


@dataclass
class Case:
    """A base, what is trained beside the adapter, and how."""

    base: str
    modules: tuple = ()
    tying: bool = False
    grown: bool = False
    steps: bool = False


CASES = {
    "untied": Case("llama", ("embed_tokens", "lm_head"), steps=True),
    "untied-head": Case("llama", ("lm_head",)),
    "tied": Case("llama-tied", ("embed_tokens",), tying=True, steps=True),
    "tied-embedding-alone": Case("llama-tied", ("embed_tokens",), steps=True),
    "grown": Case("llama", ("embed_tokens", "lm_head"), grown=True),
    "grown-tied": Case("llama-tied", ("embed_tokens",), tying=True, grown=True, steps=True),
    "grown-apart": Case("llama-tied", ("embed_tokens", "lm_head"), grown=True),
    "grown-unnamed": Case("llama-tied", grown=True),
}


def open_base(case, models, load):
    """The base with as many rows as the adapter's."""
    model = load(models / case.base)
    if case.grown:
        torch.manual_seed(41)
        model.resize_token_embeddings(GROWN)
    return model


def make_adapter(case, models, load):
    """An adapter whose tables are not the base's."""
    adapted = with_random_adapter(
        open_base(case, models, load), seed=43, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"],
        modules_to_save=list(case.modules) or None, ensure_weight_tying=case.tying,
    )
    # PEFT compares the vocabulary with the base's to see whether it was resized
    adapted.peft_config["default"].base_model_name_or_path = str(models / case.base)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name and parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return adapted


def plain_name(name):
    return name.replace(".default", "").replace(".modules_to_save", "")


def write_case(name, case, folder, models, load):
    adapted = make_adapter(case, models, load)
    save_adapter(adapted, folder / "adapter", base=case.base)
    base = open_base(case, models, load)
    tensors = {"resized": base.get_input_embeddings().weight.detach().clone()} if case.grown else {}
    again = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    generator = torch.Generator().manual_seed(45)
    rows = [torch.randint(3, GROWN if case.grown else 96, (length,), generator=generator) for length in (7, 13, 4)]
    for index, row in enumerate(rows):
        with torch.no_grad():
            tensors |= {f"ids.{index}": row, f"logits.{index}": again(row[None]).logits[0].clone()}
    loss, _ = padded_loss(again, rows)
    loss.backward()
    tensors["loss"] = loss.detach()
    tensors |= {f"grad.{plain_name(key)}": p.grad for key, p in again.named_parameters() if p.requires_grad}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
    again.zero_grad()
    if case.steps:
        settings = sft.RUNS["linear"]
        log = sft.train(again, sft.make_rows(), settings)
        again.peft_config["default"].base_model_name_or_path = str(models / case.base)
        save_adapter(again, folder / "end_adapter", base=case.base)
        (folder / "expected.json").write_text(json.dumps({"settings": settings, **log}, indent=2) + "\n")
    print(f"tables/{name}: {len(tensors)} tensors, loss {loss.item():.5f}")


def write_all(models, load):
    """Writes every case; `models` is the folder of checkpoints and `load` opens one in f32."""
    root = models.parents[2] / "pmetal-lora/tests/fixtures"
    for name, case in CASES.items():
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
        write_case(name, case, root / name, models, load)
