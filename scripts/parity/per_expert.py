"""Adapters of Qwen 3 MoE as PEFT wrote them while each expert was a module of its own; PEFT 0.21 still reads them."""

import json

import torch
from safetensors.torch import save_file

from parity.lora import ALL_LINEAR

R, ALPHA = 2, 4


def draw_tensors(model, seed):
    """One pair for each projection of each expert, and one for the query."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def pair(module, rows, columns):
        for side, shape, size in (("A", (R, columns), 0.2), ("B", (rows, R), 0.1)):
            noise = torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = size * noise

    for index, layer in enumerate(model.model.layers):
        pair(f"model.layers.{index}.self_attn.q_proj", *layer.self_attn.q_proj.weight.shape)
        experts = layer.mlp.experts
        for expert in range(experts.num_experts):
            at = f"model.layers.{index}.mlp.experts.{expert}"
            pair(f"{at}.gate_proj", experts.intermediate_dim, experts.hidden_dim)
            pair(f"{at}.up_proj", experts.intermediate_dim, experts.hidden_dim)
            pair(f"{at}.down_proj", experts.hidden_dim, experts.intermediate_dim)
    return tensors


def write_adapter(model, folder, base, seed=17):
    """The folder, and its tensors."""
    tensors = draw_tensors(model, seed)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(
        base_model_name_or_path=base, bias="none", fan_in_fan_out=False, inference_mode=True, lora_alpha=ALPHA,
        lora_dropout=0.0, peft_type="LORA", r=R, target_modules=["q_proj"] + ALL_LINEAR[4:], task_type="CAUSAL_LM",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tensors


@torch.no_grad()
def merged(model, tensors):
    """The adapter's products added to the base's matrices: what the adapter means, without PEFT."""
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        delta = ALPHA / R * tensors[name.replace("lora_A", "lora_B")] @ a
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
        layer = model.model.layers[int(path[2])]
        if path[3] == "self_attn":
            layer.self_attn.q_proj.weight += delta
        elif path[6] == "down_proj":
            layer.mlp.experts.down_proj[int(path[5])] += delta
        else:
            half = {"gate_proj": 0, "up_proj": 1}[path[6]]
            layer.mlp.experts.gate_up_proj[int(path[5])].unflatten(0, (2, -1))[half] += delta
    return model
