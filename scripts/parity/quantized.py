"""Writes crates/pmetal-models/tests/quantized: tensors of fp8 and mxfp4, and what torch and transformers decode them to.

    python scripts/parity/quantized.py

model.safetensors, with blocks of 2 by 4:
    bytes, bytes_scale_inv      fp8 [16, 16]: every byte, scales of one
    fp8.weight, its scales      fp8 [6, 8] with scales f32 [3, 2]
    ragged.weight, its scales   fp8 [5, 7] with scales f32 [3, 2]: the last blocks are cut off
    bf16.weight, its scales     fp8 [6, 8] with scales bf16
    stack, its scales           fp8 [2, 6, 8] with scales f32 [2, 3, 2]
    experts.x_blocks, _scales   u8 [2, 6, 3, 16] and [2, 6, 3]
    plain                       bf16 [2, 3, 5]
expected.safetensors holds each under its name, and `experts.x` [2, 96, 6], in bf16 (`bytes` in f32).
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FOLDER = Path(__file__).parent.parent.parent / "crates/pmetal-models/tests/quantized"
BLOCK = (2, 4)
NOT_A_NUMBER = (0x7F, 0xFF)


def fp8(generator, *shape):
    numbers = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    for byte in NOT_A_NUMBER:
        numbers[numbers == byte] = 0x31
    return numbers.view(torch.float8_e4m3fn)


def decoded(numbers, scales):
    """transformers' decoding, of matrices filled up to whole blocks."""
    rows, width = numbers.shape[-2:]
    whole = (*numbers.shape[:-2], *(-(-n // block) * block for n, block in zip((rows, width), BLOCK)))
    filled = torch.zeros(whole, dtype=torch.uint8)
    filled[..., :rows, :width] = numbers.view(torch.uint8)
    result = Fp8Dequantize(SimpleNamespace())._dequantize_one(filled.view(torch.float8_e4m3fn), scales, torch.bfloat16)
    return result[..., :rows, :width].contiguous()


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    scales = lambda *shape: torch.rand(shape, generator=generator) * 3 + 0.01
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.float8_e4m3fn)
    model = {"bytes": every, "bytes_scale_inv": torch.ones(8, 4)}
    expected = {"bytes": every.float()}
    for name, shape, blocks, dtype in [
        ("fp8.weight", (6, 8), (3, 2), torch.float32),
        ("ragged.weight", (5, 7), (3, 2), torch.float32),
        ("bf16.weight", (6, 8), (3, 2), torch.bfloat16),
        ("stack", (2, 6, 8), (2, 3, 2), torch.float32),
    ]:
        model[name], model[f"{name}_scale_inv"] = fp8(generator, *shape), scales(*blocks).to(dtype)
        expected[name] = decoded(model[name], model[f"{name}_scale_inv"])
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    powers = torch.randint(118, 136, (2, 6, 3), generator=generator, dtype=torch.uint8)
    powers[0, 0, :2] = torch.tensor([2, 250], dtype=torch.uint8)
    model |= {"experts.x_blocks": blocks, "experts.x_scales": powers}
    expected["experts.x"] = convert_moe_packed_tensors(blocks, powers)
    model["plain"] = expected["plain"] = torch.randn(2, 3, 5, generator=generator).bfloat16()
    FOLDER.mkdir(exist_ok=True)
    save_file(model, FOLDER / "model.safetensors", metadata={"format": "pt"})
    save_file({name: tensor.clone() for name, tensor in expected.items()}, FOLDER / "expected.safetensors")
    print({name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in expected.items()})


main()
