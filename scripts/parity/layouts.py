"""How the folders on the hub differ from what transformers 5 writes: each function changes a saved folder in place."""

import json
import re

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8 = torch.float8_e4m3fn
BLOCK = 128
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def edit_json(folder, change):
    """`change` gets the dictionary of config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2) + "\n")


def edit_weights(folder, change):
    """`change` turns the dictionary of tensors into another."""
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def with_keys(**keys):
    """Keys added to config.json, or replaced."""
    return lambda folder: edit_json(folder, lambda config: config.update(keys))


def without_keys(*keys, inside=None):
    """Keys that an older file does not have, of config.json or of the dictionary `inside` it."""
    return lambda folder: edit_json(folder, lambda config: [(config[inside] if inside else config).pop(k) for k in keys])


def renamed_keys(**names):
    """Keys under another name."""
    return lambda folder: edit_json(
        folder, lambda config: config.update({new: config.pop(old) for old, new in names.items()})
    )


def old_spelling(config, version="4.43.0", kind="rope_type"):
    """The keys of files published before transformers 5; `kind` is how a scaling names its type."""
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config.pop("_sliding_window_pattern", None)
    nested = rope.get("full_attention")
    if nested:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = nested
    config["rope_theta"] = rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        config["partial_rotary_factor"] = partial
    if kind != "rope_type":
        rope[kind] = rope.pop("rope_type")
    config["rope_scaling"] = rope if rope[kind] != "default" else None
    config.pop("layer_types", None)
    config["transformers_version"] = version


def text_hub_keys(folder):
    """The old keys inside a text_config."""
    edit_json(folder, lambda config: old_spelling(config["text_config"]))


def hub_keys(folder):
    edit_json(folder, old_spelling)


def hub_keys_with_type(folder):
    edit_json(folder, lambda config: old_spelling(config, version="4.38.0", kind="type"))


def renamed_weights(*rules):
    """Weights under other names: pairs of a pattern and what replaces it."""
    def rename(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name
    return lambda folder: edit_weights(folder, lambda tensors: {rename(name): t for name, t in tensors.items()})


def copied_layer(source, target):
    """A layer beyond the last one, as checkpoints with multi-token prediction have: a copy of another."""
    def change(tensors):
        mark = f"model.layers.{source}."
        extra = {name.replace(mark, f"model.layers.{target}."): t * 0.5 for name, t in tensors.items() if mark in name}
        width = tensors["model.norm.weight"].shape[0]
        extra[f"model.layers.{target}.eh_proj.weight"] = torch.full((width, 2 * width), 0.5, dtype=torch.bfloat16)
        extra[f"model.layers.{target}.enorm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        return tensors | extra
    return lambda folder: edit_weights(folder, change)


def blocks_of(scales, shape):
    """One scale for each element of a matrix whose blocks of 128 by 128 share one."""
    return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:shape[0], :shape[1]]


def to_fp8(weight):
    """A matrix in e4m3 and the f32 scale of each block: value = fp8 * scale."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scales = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = weight[i * BLOCK:(i + 1) * BLOCK, j * BLOCK:(j + 1) * BLOCK].float()
            scales[i, j] = block.abs().max() / 448.0
    return (weight.float() / blocks_of(scales, weight.shape)).to(FP8), scales


def is_fp8(name, tensor):
    """Linear layers of attention, indexer and MLPs are; the routers, the embedding, the head and the indexer's weights aren't."""
    kinds = ("_proj.weight", "_mqa.weight", ".wq_b.weight", ".wk.weight")
    return tensor.ndim == 2 and name.endswith(kinds) and "weights_proj" not in name and "eh_proj" not in name


def fp8_blocks(folder):
    """Linear layers as block-scaled fp8 with `weight_scale_inv` beside, as DeepSeek publishes them."""
    def change(tensors):
        result = {}
        for name, tensor in tensors.items():
            if is_fp8(name, tensor):
                result[name], result[f"{name}_scale_inv"] = to_fp8(tensor)
            else:
                result[name] = tensor
        return result
    edit_weights(folder, change)
    quantization = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[BLOCK, BLOCK])
    with_keys(quantization_config=quantization)(folder)


def from_fp8(tensors):
    """The tensors of an fp8 file in f32, scales gone."""
    def plain(name, tensor):
        scale = tensors.get(f"{name}_scale_inv")
        return tensor if scale is None else tensor.float() * blocks_of(scale, tensor.shape)
    return {name: plain(name, t) for name, t in tensors.items() if not name.endswith("_scale_inv")}


def to_mxfp4(weight):
    """`[E, in, out]` as blocks u8 `[E, out, in/32, 16]`, low nibble first, and scales u8 `[E, out, in/32]`, exponent + 127."""
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    values = torch.tensor(FP4)
    codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low + 16 * high).to(torch.uint8), (exponents + 127).to(torch.uint8)


def from_mxfp4(blocks, scales):
    """The inverse, in f32."""
    values = torch.tensor(FP4 + tuple(-x for x in FP4))
    codes = torch.stack([blocks % 16, blocks // 16], -1).flatten(-2).long()
    return (values[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)


def mxfp4_experts(folder):
    """Experts as GPT-OSS publishes them."""
    def change(tensors):
        result = {}
        for name, tensor in tensors.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                blocks, scales = to_mxfp4(tensor)
                assert torch.equal(from_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                result |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            else:
                result[name] = tensor
        return result
    edit_weights(folder, change)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    with_keys(quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=kept))(folder)


def dequantised(tensors):
    """What a quantised file means, in tensors that transformers reads without its quantisers."""
    result = from_fp8(tensors)
    for name in [name for name in result if name.endswith("_blocks")]:
        plain = name.removesuffix("_blocks")
        result[plain] = from_mxfp4(result.pop(name), result.pop(f"{plain}_scales"))
    return result
