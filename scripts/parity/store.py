"""Where the checkpoints of the parity tests lie, and how they are written and read."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from parity.families import FIXTURES
from parity.fixture import randomise
from parity.layouts import dequantised

LANDED = Path(__file__).parents[2] / "crates/pmetal-models/tests/fixtures"
EAGER = dict(dtype=torch.float32, attn_implementation="eager")


def home(name):
    """The folder of a checkpoint."""
    return LANDED / name


def save_checkpoint(name, seed, folder):
    """Writes config and weights of one fixture."""
    spec = FIXTURES[name]
    if spec.weights_of:
        model = load(home(spec.weights_of))
    else:
        model = (spec.model or AutoModelForCausalLM.from_config)(spec.configuration())
        randomise(model, seed, spec.norms_around)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(spec.dtype)
    model.save_pretrained(
        folder, max_shard_size=spec.max_shard_size, save_original_format=not spec.fused
    )
    (folder / "generation_config.json").unlink(missing_ok=True)
    for edit in spec.edits:
        edit(folder)


def plain_copy(folder, copy):
    """A copy of a folder that transformers doesn't read as it is: quantised weights as what they mean, `su` as longrope."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "adapter*"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if (config.get("rope_scaling") or {}).get("type") == "su":
        config["rope_scaling"]["type"] = "longrope"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
    save_file({name: t.contiguous() for name, t in dequantised(tensors).items()}, copy / "model.safetensors", {"format": "pt"})
    return copy


def load(folder, config=None):
    """The model in f32 with eager attention and experts; `config` instead of the folder's."""
    text = (folder / "config.json").read_text()
    cls = FIXTURES[folder.name].model or AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as scratch:
        source = plain_copy(folder, Path(scratch) / folder.name) if '"quant_method"' in text or '"su"' in text else folder
        model, report = cls.from_pretrained(
            source, config=config or AutoConfig.from_pretrained(source), output_loading_info=True, **EAGER
        )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    layers = model.config.get_text_config().num_hidden_layers
    beyond = [key for key in report["unexpected_keys"] if not key.startswith(f"model.layers.{layers}.")]
    assert config or not (report["missing_keys"] or beyond), f"{folder}: {report}"
    return model
