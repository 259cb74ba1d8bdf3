"""GGUF files of checkpoints that pmetal-models has as Hugging Face folders, converted as llama.cpp's script does.

Each file is opened in llama.cpp, whose next-token probabilities must be those of the checkpoint in transformers: that proves the
names, the row order of q and k, the biases and the rotary divisors of the files the Rust tests read.
"""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from safetensors.torch import load_file

from . import llama_cpp

ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
TWINS = ["llama", "llama-biased", "llama3-rope", "qwen2-tied", "qwen3-tied-f16"]
# llama.cpp attends in f16. Without the row order or the divisors the differences are above 4.
TOLERANCE = 2e-2


def write(folder, checkpoints):
    for name in TWINS:
        convert(checkpoints / name, folder / f"{name}.gguf")
        with tempfile.TemporaryDirectory() as scratch:
            check(checkpoints / name, Path(scratch) / f"{name}.gguf")


def convert(checkpoint, path, placeholder_vocabulary=False):
    config = json.loads((checkpoint / "config.json").read_text())
    config.setdefault("rope_parameters", {"rope_theta": config.get("rope_theta"), "rope_type": "default"})
    architecture = ARCHITECTURES[config["model_type"]]
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    write_config(writer, config)
    if placeholder_vocabulary:
        write_placeholder_vocabulary(writer, config["vocab_size"])
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        numbers = weight.numpy()
        if config["model_type"] == "llama" and ".q_proj." in name:
            numbers = pairs_adjacent(numbers, config["num_attention_heads"])
        if config["model_type"] == "llama" and ".k_proj." in name:
            numbers = pairs_adjacent(numbers, config["num_key_value_heads"])
        if numbers.ndim == 1:
            numbers = numbers.astype(np.float32)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(numbers))
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(writer, config):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])


def write_placeholder_vocabulary(writer, size):
    """llama.cpp serves no model without a vocabulary; nothing is tokenized with this one."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(size)])
    writer.add_token_types([TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def pairs_adjacent(numbers, heads):
    """Rows i and i + d/2 of a head of d rows become rows 2i and 2i + 1."""
    halves = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(numbers.shape)


def llama3_divisors(config):
    """What each rotary frequency is divided by under `llama3` scaling."""
    rope = config["rope_parameters"]
    divisors = []
    for pair in range(config["head_dim"] // 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (2 * pair / config["head_dim"]))
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / rope["factor"] + kept))
    return np.array(divisors, dtype=np.float32)


def check(checkpoint, path):
    convert(checkpoint, path, placeholder_vocabulary=True)
    expected = load_file(checkpoint / "expected.safetensors")
    worst = 0.0
    with llama_cpp.serve(path) as server:
        for row in range(3):
            logits = expected[f"logits.{row}"]
            ids = expected[f"ids.{row}"].tolist()
            found = torch.tensor(server.next_token_logprobs(ids, logits.shape[1]))
            worst = max(worst, (torch.log_softmax(logits[-1], -1) - found).abs().max().item())
    print(f"{path.name}: llama.cpp's log-probabilities differ from transformers' by at most {worst:.1e}")
    assert worst < TOLERANCE, path.name
