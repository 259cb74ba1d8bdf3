"""PEFT adapters of the fixtures: made, saved without machine-dependent details, and their gradients by file name."""

import json

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK_FOUR = dict(r=4, lora_alpha=8, target_modules=ALL_LINEAR)


def with_random_adapter(model, seed, zero_b=False, **options):
    """The model wrapped by PEFT, A as PEFT draws it, B random (or zero, as PEFT starts)."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options))
    adapted.peft_config["default"].base_model_name_or_path = None  # a name would be looked up on the hub
    if not zero_b:
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
    return adapted


def save_adapter(adapted, folder, base):
    """A PEFT folder whose bytes depend on nothing but the weights: no paths, sorted modules, no model card."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("target_modules", "target_parameters"):
        if isinstance(config[key], list):
            config[key].sort()
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2) + "\n")


def peft_gradients(adapted):
    """Gradients of an adapter, named as in adapter_model.safetensors."""
    gradients = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    return get_peft_model_state_dict(adapted, state_dict=gradients)
