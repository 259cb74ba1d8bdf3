"""Writes the tiny checkpoints, and what transformers and PEFT compute with them, that the parity tests read.

    pip install -r scripts/requirements.txt     # torch 2.15.0, transformers 5.23.0, peft 0.21.2
    python scripts/make-parity-fixtures.py [NAME ...]

Each folder of crates/pmetal-models/tests/fixtures is an ordinary Hugging Face folder plus `expected.safetensors`:
    ids.N            i64 [len]         three rows of unequal length
    logits.N         f32 [len, vocab]  the row alone through the model, stored weights widened to f32, eager attention
    greedy.0         i64 [8]           greedy continuation of row 0
    lora_logits.N    f32 [len, vocab]  with the adapter in `adapter/` (r 4, alpha 8, seven linears, B not zero)
    loss             f32 []            adapter on, the three rows right-padded: summed next-token loss / number of targets
    grad.NAME        f32               gradient of that loss, NAME as in adapter_model.safetensors
    full_grad.NAME   f32               (some) gradient of the same loss without the adapter, for every weight; `full_loss` beside it
    rslora_logits.N  f32 [len, vocab]  (some) with `adapter-rslora/` (rsLoRA, r 8, alpha 8, q_proj and v_proj)
The folders of crates/pmetal-trainer/tests/fixtures hold eight optimizer steps; see `parity/sft.py`.
Those of crates/pmetal-lora/tests/fixtures hold adapters with an embedding or a head; see `parity/tables.py`.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

from parity import sft, tables
from parity.lora import ALL_LINEAR, peft_gradients, save_adapter, with_random_adapter
from parity.loss import padded_loss

FIXTURES = Path(__file__).parent.parent / "crates/pmetal-models/tests/fixtures"
SIZES = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
    max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)
# Band edges at wavelengths 16 and 64: with head_dim 16 the eight frequencies fall on both sides and in between.
LLAMA3_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


@dataclass
class Fixture:
    """One checkpoint: how it is configured and stored, and which extra expectations it carries."""

    config: object
    changes: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lengths: tuple = (7, 13, 4)
    max_shard_size: str = "5GB"
    hub_keys: bool = False
    full_gradients: bool = False
    rslora: bool = False
    weights_of: str | None = None


WIDE_HEAD = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
ROPE_LLAMA3 = dict(**WIDE_HEAD, rope_parameters=dict(rope_theta=10000.0, **LLAMA3_ROPE))
MILLION = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))
FIXTURE_LIST = {
    "llama": Fixture(LlamaConfig, rslora=True),
    "llama3-rope": Fixture(LlamaConfig, ROPE_LLAMA3, lengths=(7, 40, 4)),
    "llama3-rope-hub": Fixture(LlamaConfig, ROPE_LLAMA3, lengths=(7, 40, 4), hub_keys=True, weights_of="llama3-rope"),
    "llama-tied": Fixture(LlamaConfig, dict(tie_word_embeddings=True), full_gradients=True),
    "llama-biased": Fixture(LlamaConfig, dict(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2)),
    "llama-head-dim": Fixture(LlamaConfig, dict(hidden_size=40, head_dim=16)),
    "llama-sharded-bf16": Fixture(LlamaConfig, dict(num_hidden_layers=3), torch.bfloat16, max_shard_size="30KB"),
    "qwen2": Fixture(Qwen2Config, dict(num_key_value_heads=1, **MILLION)),
    "qwen2-tied": Fixture(Qwen2Config, dict(tie_word_embeddings=True, **MILLION), hub_keys=True),
    "qwen3": Fixture(Qwen3Config, dict(head_dim=16, **MILLION), full_gradients=True),
    "qwen3-biased": Fixture(Qwen3Config, dict(head_dim=12, attention_bias=True, **MILLION)),
    "qwen3-tied-f16": Fixture(Qwen3Config, dict(head_dim=16, tie_word_embeddings=True, **MILLION), torch.float16),
}


def randomise(model, seed):
    """Weights large enough that logits are far from flat; norms and biases far from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name
        parameter.data = 1.0 + 0.4 * noise if is_norm else 0.3 * noise


def use_hub_keys(path):
    """Rewrites config.json with the keys of files published before transformers 5."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config.pop("layer_types", None)
    config["transformers_version"] = "4.43.0"
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_checkpoint(name, spec, folder):
    """Writes config and weights of one fixture."""
    config = spec.config(**{**SIZES, **spec.changes}, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config)
    source = spec.weights_of or name
    randomise(model, seed=1000 + list(FIXTURE_LIST).index(source))
    model.to(spec.dtype).save_pretrained(folder, max_shard_size=spec.max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if spec.hub_keys:
        use_hub_keys(folder / "config.json")


@torch.no_grad()
def row_logits(model, rows):
    return [model(row[None]).logits[0].clone() for row in rows]


@torch.no_grad()
def greedy(model, row, steps=8):
    """Greedy continuation without a cache; refuses a choice too close to call."""
    ids = row.clone()
    for _ in range(steps):
        best = model(ids[None]).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 5e-3, "two tokens nearly tie: choose another seed"
        ids = torch.cat([ids, best.indices[:1]])
    return ids[len(row):]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def expectations(name, spec, folder):
    """Everything expected.safetensors holds for one fixture; writes its adapters on the way."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator) for length in spec.lengths]
    model = load(folder)
    tensors = {f"ids.{i}": row for i, row in enumerate(rows)}
    tensors |= {f"logits.{i}": logits for i, logits in enumerate(row_logits(model, rows))}
    tensors["greedy.0"] = greedy(model, rows[0])
    if spec.full_gradients:
        loss = padded_loss(model, rows)
        loss.backward()
        tensors["full_loss"] = loss.detach()
        tensors |= {f"full_grad.{key}": parameter.grad for key, parameter in model.named_parameters()}

    adapted = with_random_adapter(load(folder), seed=11, r=4, lora_alpha=8, target_modules=ALL_LINEAR)
    save_adapter(adapted, folder / "adapter", base=name)
    tensors |= {f"lora_logits.{i}": logits for i, logits in enumerate(row_logits(adapted, rows))}
    loss = padded_loss(adapted, rows)
    loss.backward()
    tensors["loss"] = loss.detach()
    gradients = peft_gradients(adapted)
    assert gradients.keys() == load_file(folder / "adapter/adapter_model.safetensors").keys()
    tensors |= {f"grad.{key}": gradient for key, gradient in gradients.items()}

    if spec.rslora:
        adapted = with_random_adapter(
            load(folder), seed=13, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True
        )
        save_adapter(adapted, folder / "adapter-rslora", base=name)
        tensors |= {f"rslora_logits.{i}": logits for i, logits in enumerate(row_logits(adapted, rows))}
    return tensors


def main():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for name in sys.argv[1:] or FIXTURE_LIST:
        spec, folder = FIXTURE_LIST[name], FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(name, spec, folder)
        tensors = expectations(name, spec, folder)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
        spread = tensors["logits.1"].std().item()
        print(f"{name}: {len(tensors)} tensors, loss {tensors['loss'].item():.5f}, logits' standard deviation {spread:.2f}")
    if len(sys.argv) == 1:
        sft.write_all(FIXTURES, load)
        tables.write_all(FIXTURES, load)


if __name__ == "__main__":
    main()
