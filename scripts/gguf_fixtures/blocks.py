"""One tensor in every block format, and the numbers it decodes to."""

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGML_QUANT_SIZES, GGUFWriter, quants
from safetensors.numpy import save_file

QUANTIZED_HERE = [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
# The package only decodes these: blocks are random bytes, except the f16 scales at these offsets in a block of that size.
RANDOM_BLOCKS = {
    Type.Q2_K: (84, [80, 82]),
    Type.Q3_K: (110, [108]),
    Type.Q4_K: (144, [0, 2]),
    Type.Q5_K: (176, [0, 2]),
    Type.Q6_K: (210, [208]),
}
# Formats of intermediate results, decoded by their definition in ggml-common.h: scale times signed bytes.
SCALED_BYTES = {
    Type.Q8_1: np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)]),
    Type.Q8_K: np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)]),
}
# Exponents of the blocks in MXFP4, from the least to a large one.
MXFP4_EXPONENTS = [0, 1, 2, 115, 127, 140]
# The package still counts Q8_1's two scales as f32; in ggml they have long been f16.
GGML_QUANT_SIZES[Type.Q8_1] = (32, SCALED_BYTES[Type.Q8_1].itemsize)


def write(folder):
    rng = np.random.default_rng(7)
    writer = GGUFWriter(folder / "blocks.gguf", "llama")
    expected = {}

    def add(block_type, stored, decoded):
        writer.add_tensor(block_type.name, stored, raw_dtype=block_type)
        expected[block_type.name] = np.ascontiguousarray(decoded, dtype=np.float32)

    numbers = rng.normal(size=(3, 96)).astype(np.float32)
    add(Type.F32, numbers, numbers)
    for block_type in QUANTIZED_HERE:
        stored = quants.quantize(rng.normal(size=(3, 96)).astype(np.float32), block_type)
        add(block_type, stored, quants.dequantize(stored, block_type))
    for block_type, (size, scales) in RANDOM_BLOCKS.items():
        stored = rng.integers(0, 256, size=(3, 2, size), dtype=np.uint8)
        for at in scales:
            scale = rng.uniform(-0.02, 0.02, size=(3, 2, 1)).astype(np.float16)
            stored[:, :, at : at + 2] = scale.view(np.uint8)
        stored = stored.reshape(3, -1)
        add(block_type, stored, quants.dequantize(stored, block_type))
    for block_type, layout in SCALED_BYTES.items():
        blocks = np.frombuffer(rng.bytes(6 * layout.itemsize), layout).copy()
        blocks["d"] = rng.uniform(-0.02, 0.02, size=6)
        decoded = blocks["d"].astype(np.float32)[:, None] * blocks["qs"].astype(np.float32)
        add(block_type, blocks.view(np.uint8).reshape(3, -1), decoded.reshape(3, -1))
    blocks = rng.integers(0, 256, size=(6, 17), dtype=np.uint8)
    blocks[:, 0] = MXFP4_EXPONENTS
    blocks = blocks.reshape(3, -1)
    add(Type.MXFP4, blocks, quants.dequantize(blocks, Type.MXFP4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, folder / "blocks.safetensors")
